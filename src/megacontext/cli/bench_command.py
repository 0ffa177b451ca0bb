"""``megacontext bench SUITE``: measures that end with one JSON line."""

from __future__ import annotations

import argparse
import shlex
import sys

from rich.table import Table

from megacontext.cli.output import console, live_picture, read_config, token_progress, write_json
from megacontext.evaluation.base_suite import BaseSuiteConfig, run_base_suite
from megacontext.evaluation.ingest_suite import IngestSuiteConfig, run_ingest_suite
from megacontext.evaluation.metrics import Estimate
from megacontext.evaluation.report import suite_line

_QUICK_BASE = ["samples=100", "prose_windows=20"]
_QUICK_INGEST = ["tokens=200000"]


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
) -> None:
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
