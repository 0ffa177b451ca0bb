"""The fuzz campaign: whatever the bytes are, a result or one clear line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import get_args

import pytest

from tools import fuzz_campaign
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
        error = (
            "ValueError: two lines\n==1== ERROR: libFuzzer: fuzz target exited" if broken else ""
        )
        return subprocess.CompletedProcess(command, int(broken), "", error)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(fuzz_campaign.subprocess, "run", run)
    arguments = ["--set", f"output={tmp_path / 'fuzz'}", "runs=5"]
    assert fuzz_campaign.main(arguments) == 2
    assert "ValueError: two lines" in capsys.readouterr().err
    assert tuple(asked) == FUZZ_TARGETS == get_args(FuzzTarget)
    assert fuzz_campaign.main(arguments) == 2
    assert len(asked) == len(FUZZ_TARGETS), "what is in the log is not run again"


def test_some_targets_hold(tmp_path):
    pytest.importorskip("atheris")
    arguments = ["--set", "runs=50", "targets=[config,ctx]", f"output={tmp_path / 'fuzz'}"]
    assert fuzz_campaign.main(arguments) == 0
    lines = (tmp_path / "fuzz" / "cases.jsonl").read_text().splitlines()
    assert [json.loads(line)["outcome"] for line in lines] == ["held", "held"]


def test_the_runner_names_every_target():
    pytest.importorskip("atheris")
    code = "from tools import _fuzz_runner; print(*_fuzz_runner.TARGETS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == set(FUZZ_TARGETS)
