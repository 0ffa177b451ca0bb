"""``python -m tools.train_lensnet``, as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run_module
from tiny_models import save_tiny_model
from tiny_training import write_corpus

from megacontext.lensnet import LensNet, SnapshotDataset
from megacontext.runtime.base_model import BaseModel
from tools import train_lensnet

SESSION = (
    "{sessions: 1, tokens: [128], facts: 1, asks: 1, rounds: 1, calm: 1, horizon: 4, "
    "proposals: 2, entries: 1}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lensnet")
    write_corpus(folder)
    save_tiny_model(folder / "base", max_positions=512)
    return folder


@pytest.fixture
def settings(folder, tmp_path) -> list[str]:
    """The recipe of the bundled model with a random one, short texts and a few steps."""
    values = {
        "output": tmp_path / "run",
        "model": folder / "base",
        "corpus": f"[{folder / 'corpus.txt'}]",
        "engine": "{budget: 384, tail_tokens: 32}",
        "keys": "{steps: 2, texts: 1, tokens: 128, facts: 1, probe_batches: 1}",
        "rounds": f"[{SESSION}, {SESSION}]",
        "scores.steps": 2,
        "workers": 0,
    }
    assignments = [f"--set={key}={value}" for key, value in values.items()]
    return ["--config=configs/train/lensnet_tiny.yaml", *assignments]


def test_the_result_is_a_lensnet_for_the_base(settings, folder, tmp_path, capsys):
    done = run_module("tools.train_lensnet", *settings, "--json=-")
    assert done.status == 0, done.err
    assert done.result == {"lensnet": str(tmp_path / "run" / "lensnet"), "steps": 6}
    net, base = (
        LensNet.from_pretrained(done.result["lensnet"]),
        BaseModel.from_pretrained(folder / "base"),
    )
    assert (net.config.d_model, net.config.key_vocabulary) == (base.d_model, base.vocab_size)
    # The recipe decides its shape.
    assert (net.config.key_width, net.config.d_hidden, net.config.n_layers) == (96, 64, 1)
    for number in (1, 2):
        part = tmp_path / "run" / "snapshots" / f"round-{number}" / "part-0000"
        assert len(SnapshotDataset(part)) >= 2
    log = (tmp_path / "run" / "log.jsonl").read_text()
    assert log.count('"calibration"') == 2
    # A finished run only tells its result again.
    assert train_lensnet.main(settings) == 0
    assert capsys.readouterr().out == f"lensnet: {tmp_path / 'run' / 'lensnet'}\nsteps: 6\n"
    assert (tmp_path / "run" / "log.jsonl").read_text() == log


def test_a_wrong_value_is_one_line_and_exit_status_2(settings):
    complaint = run_module("tools.train_lensnet", *settings, "--set=lens.n_heads=7").complaint
    assert complaint.startswith("error: ")
    assert "n_heads 7 must divide d_hidden 64" in complaint


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--set=key_width=6"], "unknown key 'key_width'"),
        (["--set=rounds=[]"], "'rounds'"),
        (["--set=rounds=[{asks: 0, calm: 0}]"], "asks and calm must not both be 0"),
        (["--set=scores.loss.huber=0"], "'scores.loss.huber' has value 0"),
        (["--set=engine.budget=2048"], "budget 2048 is more than the 512 positions"),
        (["--set=engine.tail_tokens=500"], "tail_tokens is 500"),
        (["--set=corpus=[none.txt]"], "none.txt: no such file"),
        (["--set=corpus=[bundled:none]"], "no such bundled text"),
        (["--set=held_out_every=100"], "too few to hold out one in 100"),
        (["--set=model=./none"], "./none: no such folder"),
        (["--set=gistnet=none"], "none/config.json: no such file"),
        (["--set=device=abacus"], "device 'abacus'"),
        (["--config=none.yaml"], "none.yaml: no such file"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(settings, capsys, arguments, complaint):
    assert train_lensnet.main([*settings, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line


def test_a_damaged_checkpoint_says_what_to_do(settings, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint.safetensors").write_bytes(b"half a file")
    assert train_lensnet.main(settings) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not a whole checkpoint" in line
    assert "delete it to start anew" in line
