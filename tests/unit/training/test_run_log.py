from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from megacontext.errors import ConfigError
from megacontext.training.run_log import JsonlLog, RunLogs, WandbLog, rounded, training_progress


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class FakeWandb(ModuleType):
    """What of the package is used, with a list of the calls."""

    def __init__(self):
        super().__init__("wandb")
        self.calls = []

    def init(self, **settings):
        self.calls.append(("init", settings))
        return self

    def log(self, record, step):
        self.calls.append(("log", record, step))

    def finish(self):
        self.calls.append(("finish",))


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return fake


def test_a_record_is_a_line(tmp_path):
    log = JsonlLog(tmp_path / "log.jsonl")
    log.write(3, {"loss": 0.123456, "name": "größer"})
    log.write(4, {"probe": {"kl": float("nan"), "count": 7}})
    log.close()
    first, second = lines_of(log.path)
    assert first.pop("time") > 1e9
    assert first == {"step": 3, "loss": 0.1235, "name": "größer"}
    assert second["probe"] == {"kl": None, "count": 7}


def test_a_new_log_is_appended_to(tmp_path):
    for step in (1, 2):
        JsonlLog(tmp_path / "log.jsonl").write(step, {})
    assert [line["step"] for line in lines_of(tmp_path / "log.jsonl")] == [1, 2]


def test_rewinding_drops_what_comes_after_and_what_was_cut_off(tmp_path):
    log = JsonlLog(tmp_path / "log.jsonl")
    log.rewind(5)
    assert not log.path.exists()
    for step in (1, 2, 2, 3):
        log.write(step, {"loss": 1.0})
    with log.path.open("a") as file:
        file.write('{"step": 1, "lo')
    log.rewind(2)
    assert [line["step"] for line in lines_of(log.path)] == [1, 2, 2]
    log.write(3, {})
    assert [line["step"] for line in lines_of(log.path)] == [1, 2, 2, 3]
    log.rewind(0)
    assert log.path.read_text() == ""
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.123456, 0.1235),
        (float("inf"), None),
        (float("nan"), None),
        (12, 12),
        ("0.123456", "0.123456"),
        (True, True),
        ({"a": {"b": -1e-9, "c": float("-inf")}}, {"a": {"b": 0.0, "c": None}}),
    ],
)
def test_numbers_are_rounded_and_fit_json(value, expected):
    found = rounded(value)
    assert found == expected
    assert type(found) is type(expected)
    json.dumps(found, allow_nan=False)


def test_wandb_that_is_not_installed_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="`wandb` is true, but the package is not installed"):
        WandbLog(tmp_path, "run", {})


@pytest.mark.parametrize(("key", "mode"), [(None, "offline"), ("", "offline"), ("k", "online")])
def test_wandb_is_offline_without_a_key(tmp_path, monkeypatch, wandb, key, mode):
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    WandbLog(tmp_path, "tiny", {"seed": 3})
    ((_, settings),) = wandb.calls
    run_id = settings.pop("id")
    assert settings == {
        "project": "megacontext", "name": "tiny", "dir": str(tmp_path), "config": {"seed": 3},
        "mode": mode, "resume": "allow",
    }  # fmt: skip
    # A resumed run is the same run, another folder's is another.
    WandbLog(tmp_path, "tiny", {})
    (tmp_path / "other").mkdir()
    WandbLog(tmp_path / "other", "tiny", {})
    assert wandb.calls[1][1]["id"] == run_id
    assert wandb.calls[2][1]["id"] != run_id


def test_the_real_package_writes_an_offline_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    log = WandbLog(tmp_path, "tiny", {"seed": 3})
    log.write(1, {"loss": 0.5, "probe": {"kl": 1.0}})
    log.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_wandb_gets_every_record_and_an_end(tmp_path, wandb):
    log = WandbLog(tmp_path, "tiny", {})
    log.write(7, {"loss": 0.5})
    log.rewind(3)
    log.close()
    assert wandb.calls[1:] == [("log", {"loss": 0.5}, 7), ("finish",)]


def test_several_logs_get_the_same(tmp_path, wandb):
    logs = RunLogs(JsonlLog(tmp_path / "a.jsonl"), WandbLog(tmp_path, "tiny", {}))
    logs.write(1, {"loss": 1.0})
    logs.write(2, {"loss": 0.5})
    logs.rewind(1)
    logs.close()
    assert [line["step"] for line in lines_of(tmp_path / "a.jsonl")] == [1]
    assert [call[0] for call in wandb.calls] == ["init", "log", "log", "finish"]


def test_the_progress_bar_counts():
    with training_progress() as progress:
        task = progress.add_task("training", total=4, completed=1)
        progress.update(task, completed=4)
        assert progress.finished
