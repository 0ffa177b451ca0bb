"""Runs commands in this process, which is quick, or in one of their own, as a user does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacontext.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    "PYTHONUTF8": "1",
    "COLUMNS": "100",
}


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def result(self) -> Any:
        """The JSON object that the last line of standard output is."""
        return json.loads(self.out.splitlines()[-1])

    @property
    def complaint(self) -> str:
        """The one line that a refused command writes."""
        assert self.status == 2, self.err
        assert self.out == ""
        (line,) = self.err.splitlines()
        return line


class CommandLine:
    """``megacontext …`` within the test's process."""

    def __init__(self, capsys: Any, monkeypatch: Any) -> None:
        self.capsys = capsys
        self.monkeypatch = monkeypatch

    def __call__(self, *arguments: object, stdin: bytes = b"") -> Done:
        reader = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
        self.monkeypatch.setattr(sys, "stdin", reader)
        self.capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        return Done(status, *self.capsys.readouterr())


def run_module(module: str, *arguments: object, cwd: Path = ROOT, stdin: bytes = b"") -> Done:
    """``python -m MODULE …`` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        input=stdin,
        capture_output=True,
        check=False,
    )
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())
