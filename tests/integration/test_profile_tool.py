"""``python -m tools.profile_engine``: a picture, or one line that says what is missing."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from tools import profile_engine

BESIDE = str(Path(sys.executable).parent)


@pytest.mark.skipif(
    shutil.which("py-spy", path=BESIDE) is None and shutil.which("py-spy") is None,
    reason="needs the extra `profile`",
)
@pytest.mark.parametrize(("what", "function"), [("decode", "refocus"), ("ingest", "append")])
def test_a_picture_shows_what_was_done(tmp_path, capsys, what, function):
    picture = tmp_path / "pictures" / f"{what}.svg"
    status = profile_engine.main([
        "--set", f"what={what}", "seconds=2", "rate=50", "history_tokens=3000",
        "approach_blocks=0", f"output={picture}", "--json=-",
    ])  # fmt: skip
    out, err = capsys.readouterr()
    if "Permission denied" in err or "not permitted" in err:
        pytest.skip("this machine lets nobody look into a process")
    assert status == 0, err
    assert json.loads(out) == {"what": what, "picture": str(picture)}
    assert re.search(rf"<title>[^<(]*\b{function} \(", picture.read_text())


def test_without_a_sampler_one_line_says_what_to_install(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert profile_engine.main(["--set", f"output={tmp_path / 'a.svg'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "error: profiling needs py-spy; install the extra `profile`"


def test_a_sampler_that_fails_is_one_line(capsys, monkeypatch, tmp_path):
    sampler = tmp_path / "py-spy"
    sampler.write_text("#!/bin/sh\necho Permission denied: try again as root\nexit 1\n")
    sampler.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    small = ["history_tokens=3000", "approach_blocks=0", f"output={tmp_path / 'a.svg'}"]
    assert profile_engine.main(["--set", *small]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: py-spy failed: Permission denied: try again as root"
    ]
