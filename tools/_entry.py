"""What every tool shares: ``--config``, ``--set``, ``--json``, one line per error, exit status."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from megacontext.cli.output import (
    add_config_options,
    hide_loading_bars,
    read_config,
    run_command,
    write_json,
)
from megacontext.config import FrozenConfig

ConfigT = TypeVar("ConfigT", bound=FrozenConfig)
Result = Mapping[str, Any] | None


def tool_parser(description: str) -> argparse.ArgumentParser:
    """The options of every tool."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add_config_options(parser)
    return parser


def tool_main(
    description: str,
    config_type: type[ConfigT],
    run: Callable[[ConfigT], Result],
    argv: Sequence[str] | None = None,
) -> int:
    """Parses the command line, runs a tool and reports.

    The result goes to standard output as ``key: value`` lines, or where ``--json`` says; whatever
    ``run`` prints goes to standard error, so that the output can be piped.

    Args:
        description: for ``--help``.
        config_type: what ``--config`` and ``--set`` are parsed into.
        run: the tool.
        argv: arguments; ``None``: those of the process.

    Returns:
        The exit status: 0, that of the error, or 130 if interrupted.
    """
    arguments = tool_parser(description).parse_args(argv)

    def run_and_report() -> int:
        hide_loading_bars()
        config = read_config(config_type, arguments)
        with contextlib.redirect_stdout(sys.stderr):
            result = run(config) or {}
        if arguments.json is None:
            for key, value in result.items():
                print(f"{key}: {value}")
        write_json(arguments.json, result)
        return 0

    return run_command("error", arguments.json, run_and_report)
