from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from megacontext.cli.parser import build_parser

COMMANDS = [
    ["demo"],
    ["ingest", "m.mctx", "a.txt"],
    ["inspect", "m.mctx"],
    ["stats", "m.mctx"],
    ["verify", "m.mctx"],
    ["regist", "m.mctx"],
    ["ask", "--memory", "m.mctx", "What?"],
    ["chat", "--memory", "m.mctx"],
    ["bench", "base"],
    ["bench", "ingest"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_command_names_a_function(arguments):
    module, _, function = build_parser().parse_args(arguments).run.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
    "arguments", [[], ["none"], ["stats"], ["ask", "What?"], ["bench"], ["demo", "--ht", "x"]]
)
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        build_parser().parse_args(arguments)
    assert exit_.value.code == 2
    assert "usage: megacontext" in capsys.readouterr().err


def test_the_parser_does_not_wait_for_torch():
    script = (
        "import sys, megacontext.cli.main as m; m.build_parser(); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
