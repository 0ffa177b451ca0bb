"""Entry of the ``megacontext`` command."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Sequence

from megacontext.cli.output import end_settings, hide_loading_bars, run_command
from megacontext.cli.parser import build_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 2 for an error of use, 130 if interrupted."""
    parser = build_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = parser.parse_args(end_settings(words))
    parsed.words = words
    levels = logging.getLevelNamesMapping()
    if parsed.log_level.upper() not in levels:
        known = ", ".join(levels).lower()
        parser.error(f"--log-level {parsed.log_level}: expected one of {known}")
    logging.basicConfig(level=levels[parsed.log_level.upper()])

    def run() -> int:
        module, _, function = parsed.run.partition(":")
        command = getattr(importlib.import_module(module), function)
        hide_loading_bars()
        return command(parsed)

    return run_command("megacontext", parsed.json, run)


if __name__ == "__main__":
    sys.exit(main())
