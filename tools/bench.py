"""All benchmarks: ``python -m tools.bench SUITE …`` is ``megacontext bench SUITE …``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from megacontext.cli.main import main as run_cli


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run_cli(["bench", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
