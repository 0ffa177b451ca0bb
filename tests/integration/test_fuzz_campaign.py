"""The fuzz campaign: whatever the bytes are, a result or one clear line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import get_args

import pytest

from megacontext.checkpoints import read_config, read_weights
from megacontext.config import load_config
from megacontext.gistnet import GistNetConfig
from megacontext.memory.acknowledgement import NAME, Acknowledgement
from megacontext.memory.ctx_file import CtxFile
from megacontext.runtime.recording_format import read_calls
from megacontext.runtime.session import SessionConfig
from tools import fuzz_campaign
from tools._fuzz_seeds import EXPECTED_WEIGHTS, SEEDS, sealed_header, sealed_note
from tools.fuzz_campaign import FUZZ_TARGETS, FuzzTarget


def test_without_atheris_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert fuzz_campaign.main([]) == 2
    said = capsys.readouterr().err
    assert "megacontext[fuzz]" in said
    assert "Traceback" not in said


def test_a_finding_ends_the_campaign_and_is_kept(tmp_path, monkeypatch, capsys):
    """Every target is run once; what breaks is told, and not run again."""
    asked = []

    def run(command, **_):
        target = command[3]
        asked.append(target)
        broken = target == "text"
        error = "ValueError: two lines\n==1== ERROR: libFuzzer: fuzz target exited"
        said = error if broken else "#5 DONE\nDone 5 runs in 0 second(s)"
        return subprocess.CompletedProcess(command, int(broken), "", said)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(fuzz_campaign.subprocess, "run", run)
    arguments = ["--set", f"output={tmp_path / 'fuzz'}", "runs=5"]
    assert fuzz_campaign.main(arguments) == 2
    assert "ValueError: two lines" in capsys.readouterr().err
    assert tuple(asked) == FUZZ_TARGETS == get_args(FuzzTarget)
    assert fuzz_campaign.main(arguments) == 2
    assert len(asked) == len(FUZZ_TARGETS), "what is in the log is not run again"


def test_some_targets_hold(tmp_path, capsys):
    pytest.importorskip("atheris")
    arguments = ["runs=50", "targets=[config,memory]", f"output={tmp_path / 'fuzz'}"]
    assert fuzz_campaign.main(["--set", *arguments, "--json=-"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result["inputs"]) == {"config", "memory"}
    assert min(result["inputs"].values()) >= 50


def read_seed(target, path):
    """What the target's reader makes of a file; an error if it is not whole."""
    readers = {
        "ctx": lambda: CtxFile.open(path).close(),
        "note": lambda: Acknowledgement.read(path.parent),
        "config": lambda: load_config(SessionConfig, path),
        "override": lambda: load_config(SessionConfig, None, path.read_text().split("\n")),
        "checkpoint": lambda: read_config(path.parent, "gistnet", GistNetConfig),
        "weights": lambda: read_weights(path, EXPECTED_WEIGHTS),
        "recording": lambda: list(read_calls(path)),
    }
    readers[target]()


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("ctx", "L0.ctx"),
        ("note", NAME),
        ("config", "run.yaml"),
        ("override", "override"),
        ("checkpoint", "config.json"),
        ("weights", "model.safetensors"),
        ("recording", "session.jsonl"),
    ],
)
def test_mutations_start_from_what_is_whole(tmp_path, target, name):
    for seed in SEEDS[target]():
        (tmp_path / name).write_bytes(seed)
        read_seed(target, tmp_path / name)


def test_checksums_are_made_right_so_that_what_lies_behind_them_is_reached(tmp_path):
    assert set(SEEDS) == set(FUZZ_TARGETS)
    (header, *_), (note,) = SEEDS["ctx"](), SEEDS["note"]()
    assert sealed_header(header) == header
    assert sealed_note(note).startswith(note)
    changed = sealed_header(header[:6] + b"\5" + header[7:])
    (tmp_path / "L0.ctx").write_bytes(changed)
    file = CtxFile.open(tmp_path / "L0.ctx")
    file.close()
    assert file.header.level == 5
    (tmp_path / NAME).write_bytes(sealed_note(b"x" + note[1:]))
    newest = Acknowledgement.read(tmp_path)
    assert newest is not None
    assert newest.generation == 1, "the other one's magic is wrong"


def test_the_runner_names_every_target():
    pytest.importorskip("atheris")
    code = "from tools import _fuzz_runner; print(*_fuzz_runner.TARGETS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == set(FUZZ_TARGETS)
