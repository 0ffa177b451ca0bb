"""``megacontext bench SUITE``: measures that end with one JSON line."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import Any

from rich.table import Table

from megacontext.cli.output import console, live_picture, read_config, token_progress, write_json
from megacontext.evaluation.base_suite import BaseSuiteConfig, run_base_suite
from megacontext.evaluation.ingest_suite import IngestSuiteConfig, run_ingest_suite
from megacontext.evaluation.metrics import Estimate
from megacontext.evaluation.report import suite_line
from megacontext.evaluation.substitution_report import write_report
from megacontext.evaluation.substitution_suite import (
    SubstitutionSuiteConfig,
    run_substitution_suite,
)

_QUICK_BASE = ["samples=100", "prose_windows=20"]
_QUICK_INGEST = ["tokens=200000"]
_QUICK_SUBSTITUTION = ["windows=32", "answers=60", "ingest_tokens=8192"]


def run_base(arguments: argparse.Namespace) -> int:
    """Suite ``base``."""
    _be_quick(arguments, _QUICK_BASE)
    config = read_config(BaseSuiteConfig, arguments)
    with live_picture() as show:
        results = run_base_suite(config, lambda measure: show(f"taking {measure}"))
    _finish(arguments, "base", results, config.model, config.seed)
    return 0


def run_ingest(arguments: argparse.Namespace) -> int:
    """Suite ``ingest``."""
    _be_quick(arguments, _QUICK_INGEST)
    config = read_config(IngestSuiteConfig, arguments)
    with token_progress() as progress:
        task = progress.add_task("ingesting", total=config.tokens)
        results = run_ingest_suite(config, lambda count: progress.advance(task, count))
    _finish(arguments, "ingest", results, config.model, config.seed)
    return 0


def run_substitution(arguments: argparse.Namespace) -> int:
    """Suite ``substitution``."""
    _be_quick(arguments, _QUICK_SUBSTITUTION)
    config = read_config(SubstitutionSuiteConfig, arguments)
    with live_picture() as show:
        results = run_substitution_suite(config, lambda measure: show(f"taking {measure}"))
    line = _finish(arguments, "substitution", results, config.model, config.seed)
    if arguments.report is not None:
        for path in write_report(line, arguments.report):
            console.print(f"wrote {path}")
    return 0


def _be_quick(arguments: argparse.Namespace, overrides: list[str]) -> None:
    if arguments.quick:
        # What is asked for by hand comes last and wins.
        arguments.overrides = [*overrides, *arguments.overrides]


def _finish(
    arguments: argparse.Namespace,
    suite: str,
    results: dict[str, Estimate],
    model: str,
    seed: int,
) -> dict[str, Any]:
    """Prints the table and the JSON line, and returns the line."""
    table = Table(title=f"bench {suite}", title_justify="left")
    for column in ("measure", "value", "95 % interval", "n"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, estimate in results.items():
        interval = f"{estimate.low:.4g} – {estimate.high:.4g}" if estimate.n > 1 else ""
        table.add_row(name, f"{estimate.value:.4g}", interval, str(estimate.n))
    console.print(table)
    command = shlex.join(["megacontext", *sys.argv[1:]])
    line = suite_line(suite, results, model=model, seed=seed, command=command)
    if arguments.json is not None and arguments.json != "-":
        write_json(arguments.json, line)
    write_json("-", line)
    return line
