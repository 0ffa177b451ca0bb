"""The command, as a user types it."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from tiny_models import save_tiny_model, tiny_base_model

from megacontext.errors import DataError
from megacontext.runtime.base_model import BaseModel
from megacontext.training.lm_batches import read_documents
from megacontext.training.prepared_dataset import PreparedDataset
from megacontext.training.texts import resolve_text
from tools.prepare_dataset import main

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "tools.prepare_dataset"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT / "src")}


def prepare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def settings(tmp_path_factory, model) -> list[str]:
    """The toy configuration with a random model, and slices that fit it."""
    return [
        "--config=configs/data/toy.yaml",
        f"--set=model={model}",
        "--set=slices.context_tokens=64",
        "--set=slices.horizon=32",
        "--set=shard_slices=2",
        "--set=max_slices=400",
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, settings) -> Path:
    output = tmp_path_factory.mktemp("data") / "slices"
    result = prepare(*settings, f"--set=output={output}", "--json=-")
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["slices"] == 400
    assert summary["shards"] == 200
    assert summary["output"] == str(output)
    return output


def test_the_result_is_a_data_set_of_the_model(prepared, model):
    base = BaseModel.from_pretrained(model)
    data = PreparedDataset.open(prepared, base)
    book = read_documents([resolve_text("bundled:lilac_fairy_book")])[0]
    assert len(data) == len(datasets.load_from_disk(str(prepared))) == 400
    assert data[0].source == "bundled:lilac_fairy_book"
    text = "".join(base.decode(data[index].context_tokens) for index in range(400))
    assert text == book[: len(text)]
    assert data[1].offset == 64


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, settings, prepared):
    output = tmp_path / "slices"
    arguments = [*settings, f"--set=output={output}"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    third = output / "shard-00002.arrow"
    while not third.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert third.exists()
    manifest = json.loads((output / "manifest.json").read_text())
    assert not manifest["complete"], "the run ended before it was killed; make it longer"
    finished = {shard["file"]: (output / shard["file"]).stat() for shard in manifest["shards"]}
    result = prepare(*arguments)
    assert result.returncode == 0, result.stderr
    assert f"output: {output}" in result.stdout
    for name, before in finished.items():
        assert (output / name).stat().st_mtime_ns == before.st_mtime_ns, f"{name} was made again"
    assert digests(output) == digests(prepared)


def test_a_foreign_teacher_cache_is_refused(prepared):
    with pytest.raises(DataError, match="teacher states come from"):
        PreparedDataset.open(prepared, tiny_base_model(seed=1))


def test_a_wrong_value_is_one_line_and_exit_status_2(settings):
    result = prepare(*settings, "--set=slices.context_tokens=100")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert "slices.context_tokens" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--set=slices.horizon=500"], "slices.horizon"),
        (["--set=slises.horizon=64"], "unknown key 'slises'"),
        (["--set=slices"], "expected KEY=VALUE"),
        (["--set=corpus=[none.txt]"], "none.txt: no such file"),
        (["--set=corpus=[bundled:none]"], "no such bundled text"),
        (["--set=model=./none"], "./none: no such folder"),
        (["--set=device=none"], "device 'none'"),
        (["--config=none.yaml"], "none.yaml: no such file"),
        (["--json=none/result.json"], "--json none/result.json"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    tmp_path, monkeypatch, capsys, settings, arguments, complaint
):
    monkeypatch.chdir(ROOT)
    assert main([*settings, f"--set=output={tmp_path / 'slices'}", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")
    assert complaint in captured.err
    assert not (tmp_path / "slices").exists()


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, monkeypatch, capsys, settings):
    monkeypatch.chdir(ROOT)
    (tmp_path / "mine.txt").write_text("mine")
    assert main([*settings, f"--set=output={tmp_path}"]) == 2
    assert "holds mine.txt and no data set" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_result_goes_where_json_says(tmp_path, monkeypatch, capsys, settings, prepared):
    monkeypatch.chdir(ROOT)
    target = tmp_path / "result.json"
    assert main([*settings, f"--set=output={prepared}", f"--json={target}"]) == 0
    assert capsys.readouterr().out == ""
    assert json.loads(target.read_text())["slices"] == 400
