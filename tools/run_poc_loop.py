"""A short session under budget, told edit by edit: ``python -m tools.run_poc_loop --config …``."""

from __future__ import annotations

import sys
from typing import Any

from megacontext.evaluation.poc_loop import PocLoopConfig, run_poc_loop
from tools._entry import tool_main


def run(config: PocLoopConfig) -> dict[str, Any]:
    """Logs to standard output."""
    return run_poc_loop(config, lambda line: print(line, flush=True))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Streams a text under budget, asks for facts planted in it, and tells every edit.",
        PocLoopConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
