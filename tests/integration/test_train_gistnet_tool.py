"""``python -m tools.train_gistnet``, as a user types it."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run_module
from tiny_models import save_tiny_model
from tiny_training import write_corpus

from megacontext.gistnet import GistNet
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.companions import require_fit
from tools import train_gistnet


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gistnet")
    write_corpus(folder)
    save_tiny_model(folder / "base")
    return folder


@pytest.fixture
def settings(folder, tmp_path) -> list[str]:
    """The recipe of the bundled model with a random one, and a few short steps."""
    values = {
        "output": tmp_path / "run",
        "model": folder / "base",
        "corpus": f"[{folder / 'corpus.txt'}]",
        "compile": "false",
        "workers": 0,
        "mixed_precision": "false",
        "phases": "[{length: 96, rows: 1, steps: 2, replaced: [1, 2]}]",
        "probe_batches": 1,
    }
    assignments = [f"--set={key}={value}" for key, value in values.items()]
    return ["--config=configs/train/gistnet_tiny.yaml", *assignments]


def test_the_result_is_a_gistnet_for_the_base(settings, folder, tmp_path, capsys):
    done = run_module("tools.train_gistnet", *settings, "--json=-")
    assert done.status == 0, done.err
    assert done.result == {"gistnet": str(tmp_path / "run" / "gistnet"), "steps": 2}
    net = GistNet.from_pretrained(done.result["gistnet"])
    require_fit(net, BaseModel.from_pretrained(folder / "base"))
    # The recipe decides its shape.
    assert (net.cost, net.config.width_factor, net.config.pooling) == (6, 2, "slots")
    assert (tmp_path / "run" / "log.jsonl").read_text().count("kl_recall") == 1
    # A finished run only tells its result again.
    assert train_gistnet.main(settings) == 0
    assert capsys.readouterr().out == f"gistnet: {tmp_path / 'run' / 'gistnet'}\nsteps: 2\n"
    assert (tmp_path / "run" / "log.jsonl").read_text().count("kl_recall") == 1


def test_a_wrong_value_is_one_line_and_exit_status_2(settings):
    complaint = run_module("tools.train_gistnet", *settings, "--set=gistnet.slots=9").complaint
    assert complaint.startswith("error: ")
    assert "'gistnet.slots' has value 9" in complaint


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--set=slots=6"], "unknown key 'slots'"),
        (["--set=phases=[{length: 100, rows: 1, steps: 1}]"], "length 100 is not a multiple of 32"),
        (["--set=phases=[{length: 256, rows: 1, steps: 1}]"], "has 128 positions; shorten them"),
        (["--set=corpus=[none.txt]"], "none.txt: no such file"),
        (["--set=corpus=[bundled:none]"], "no such bundled text"),
        (["--set=model=./none"], "./none: no such folder"),
        (["--set=init_from=none"], "none"),
        (["--set=prepared=[none]"], "none"),
        (["--set=device=abacus"], "device 'abacus'"),
        (["--config=none.yaml"], "none.yaml: no such file"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(settings, capsys, arguments, complaint):
    assert train_gistnet.main([*settings, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert complaint in line
