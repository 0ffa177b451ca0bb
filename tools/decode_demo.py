"""Streams a short prompt through the base model: ``python -m tools.decode_demo --config …``."""

from __future__ import annotations

import sys
from typing import Any

from megacontext.evaluation.decode_demo import DecodeDemoConfig, run_decode_demo
from tools._entry import tool_main


def run(config: DecodeDemoConfig) -> dict[str, Any]:
    """Decodes to standard output."""
    result = run_decode_demo(config, _write)
    _write("\n")
    return result


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Streams a continuation of a prompt by the base model alone.",
        DecodeDemoConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
