"""Short runs of the campaigns in tools/; `docs/guarantees.md` has the commands of the long ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import needs
import pytest
from command_line import run_module
from tiny_models import save_tiny_model

from megacontext.errors import CorruptMemoryError, InputError, InvariantError
from megacontext.memory import Memory
from tools._campaign import CaseLog
from tools._corruption_runner import damages, flips, make_states
from tools._fault_runner import Stage, _check
from tools._memory_script import STEPS, append, read, rebuild, small_memory


def campaign(name: str, *settings: object) -> dict:
    done = run_module(f"tools.{name}_campaign", "--set", *settings, "--json=-")
    assert done.status == 0, done.err
    return done.result


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_positions=512)


def test_writers_that_are_killed_lose_nothing(model):
    result = campaign("crash", "kills=12", "seed=1", f"model={model}")
    assert result["cases"] == 12
    assert result["tokens_checked"] > result["most_tokens"] > 100
    assert all(outcome.startswith("killed: ") for outcome in result["outcomes"])
    assert any("a commit that was not" in outcome for outcome in result["outcomes"])


@needs.COMPILER
def test_every_call_that_writes_may_fail_or_be_the_last(model, tmp_path):
    """While a memory is made, opened and written to, and while a session takes in and decodes."""
    result = campaign("fault", "cases=80", f"model={model}", f"output={tmp_path}")
    assert result["cases"] == 80
    assert set(result["outcomes"]) == {"killed", "refused", "survived"}
    assert set(result["sites"]) == {*(step.name for step in STEPS), "session"}
    assert min(result["sites"].values()) > 20
    assert result["sites"]["session"] > 100
    cases = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    for fault in ("full disk", "short write", "input/output error", "read-only directory"):
        assert any(fault in case["case"] for case in cases)
    assert sum(case["case"].startswith("session") for case in cases) > 10


def test_damage_of_every_kind_is_noticed():
    result = campaign("corruption", "flips=300", "damages=40")
    assert result["detected"] > 100
    kinds = {kind.split(": ")[-1].split(",")[0] for kind in result["harmless"]}
    assert kinds <= {
        "acknowledged",
        "lock",
        "catalog.sqlite-shm",
        "keys.L1.faiss",
        "a page that the log has anew",
        "a page that is not in use",
        "unused space of a page",
    } | {kind for kind in kinds if kind.startswith(("page ", "database header"))}
    assert set(result["damages"]) <= {"detected", "detected by verify", "harmless"}
    assert result["damages"]["detected"] > 40


def test_readers_see_committed_prefixes_while_writers_die():
    result = campaign("concurrency", "seconds=3", "lifetime=1", "readers=8")
    assert result["writers"] >= 1
    assert result["refused"] >= 1
    assert result["commits"] > 0
    assert result["refreshes"] >= 8


def test_a_campaign_goes_on_where_it_ended(tmp_path):
    with CaseLog(tmp_path) as log:
        log.add("first", "killed")
        log.add("second", "survived")
    with (tmp_path / "cases.jsonl").open("ab") as file:
        file.write(b'{"case": "thi')
    with CaseLog(tmp_path) as log:
        assert "first" in log
        assert "third" not in log
        log.add("third", "killed")
        assert log.summary() == {"cases": 3, "outcomes": {"killed": 2, "survived": 1}}
    assert len((tmp_path / "cases.jsonl").read_text().splitlines()) == 3
    (tmp_path / "cases.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="no folder for a campaign"):
        CaseLog(tmp_path)


def test_a_broken_promise_ends_a_campaign_with_an_error():
    log = CaseLog(None)
    log.add("first", "killed")
    log.add("second", "broken: the memory is gone")
    with pytest.raises(InvariantError, match="1 of 2 cases broke a promise, first second: the mem"):
        log.summary()


@pytest.fixture
def stage(tmp_path) -> Stage:
    step = next(step for step in STEPS if step.name == "append")
    small_memory(tmp_path / "template")
    before = read(tmp_path / "template")
    with Memory.open(tmp_path / "template", "a") as memory:
        step.act(memory.path, memory)
    return Stage(step, tmp_path / "template", before, read(tmp_path / "template"), 0)


def test_the_fault_campaign_sees_what_is_lost_or_half_done(tmp_path, stage):
    path = tmp_path / "m.mctx"
    small_memory(path)
    assert _check(stage, path, "refused") is None
    small_memory(tmp_path / "again")
    shutil.copytree(tmp_path / "again", path, dirs_exist_ok=True)
    assert _check(stage, path, "survived") == "broken: append is half done"
    with Memory.open(tmp_path / "again", "a") as memory:
        append(memory, 1)
    assert _check(stage, tmp_path / "again", "refused") == "broken: append is half done"
    shutil.rmtree(path)
    assert _check(stage, path, "refused") == "broken: the memory is gone"


def test_the_corruption_campaign_sees_what_goes_unnoticed(tmp_path, monkeypatch):
    states = make_states(tmp_path)
    closed = states["closed"]
    assert flips(closed, "L0.ctx", range(3), "all bits") == {"detected": 3, "harmless": {}}
    monkeypatch.setattr(
        "tools._corruption_runner.Memory.verify_path", lambda _: type("Report", (), {"ok": True})
    )
    place = (closed.path / "catalog.sqlite").read_bytes().index(b"first.txt")
    with pytest.raises(CorruptMemoryError, match="verify passes, but the contents differ"):
        flips(closed, "catalog.sqlite", [place], "lowest bit")
    for name, damage in damages(states, closed).items():
        copy = Path(shutil.copytree(closed.path, tmp_path / "copy"))
        damage(copy)
        shutil.rmtree(copy)
        assert json.dumps(name)


def test_a_rebuild_is_part_of_what_is_compared(tmp_path):
    small_memory(tmp_path / "m.mctx")
    before = read(tmp_path / "m.mctx")
    with Memory.open(tmp_path / "m.mctx", "a") as memory:
        rebuild(memory)
    after = read(tmp_path / "m.mctx")
    assert after["tokens"] == before["tokens"]
    assert after["identity"] != before["identity"]
    assert after["gists 1"] != before["gists 1"]
