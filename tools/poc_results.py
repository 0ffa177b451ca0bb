"""Writes the page of results: ``python -m tools.poc_results --set results=FILE``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from megacontext.config import FrozenConfig
from megacontext.evaluation.proof_line import ProofLine
from megacontext.evaluation.proof_report import write_report
from tools._entry import tool_main


class PocResultsConfig(FrozenConfig):
    """From what to what.

    Attributes:
        results: what ``megacontext bench proof --json FILE`` wrote.
        output: the page. Pictures go into a folder of its name beside it.
        title: its heading.
    """

    results: Path = Path("runs/proof.json")
    output: Path = Path("docs/poc_results.md")
    title: str = "The proof, measured"


def run(config: PocResultsConfig) -> dict[str, Any]:
    """Writes page and pictures, and names them."""
    line = ProofLine.read(config.results)
    page, *pictures = write_report(line, config.output, config.output.with_suffix(""), config.title)
    return {"page": str(page), "pictures": [str(path) for path in pictures]}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Writes the page of results, with tables and pictures, from the JSON of the suite proof.",
        PocResultsConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
