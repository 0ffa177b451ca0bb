"""``megacontext bench SUITE``: measures that end with one JSON line."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from megacontext.cli.output import console, live_picture, read_config, token_progress, write_json
from megacontext.evaluation.base_suite import BaseSuiteConfig, run_base_suite
from megacontext.evaluation.cost_config import CostSuiteConfig
from megacontext.evaluation.cost_suite import run_cost_suite
from megacontext.evaluation.focus_config import FocusSuiteConfig
from megacontext.evaluation.focus_report import write_focus_report
from megacontext.evaluation.focus_suite import run_focus_suite
from megacontext.evaluation.ingest_suite import IngestSuiteConfig, run_ingest_suite
from megacontext.evaluation.metrics import Estimate
from megacontext.evaluation.proof_config import ProofSuiteConfig
from megacontext.evaluation.proof_line import ProofLine
from megacontext.evaluation.proof_report import write_report as write_proof_report
from megacontext.evaluation.proof_suite import run_proof_suite
from megacontext.evaluation.report import suite_line
from megacontext.evaluation.substitution_report import write_report
from megacontext.evaluation.substitution_suite import (
    SubstitutionSuiteConfig,
    run_substitution_suite,
)

_QUICK_BASE = ["samples=100", "prose_windows=20"]
_QUICK_INGEST = ["tokens=200000"]
_QUICK_SUBSTITUTION = ["windows=32", "answers=60", "ingest_tokens=8192"]
_QUICK_FOCUS = [
    "lengths=4k,32k", "kinds=same_words,paraphrase,corrected,two_hop,none", "groups=4", "asked=1",
    "prose_streams=1", "prose_history=4000", "prose_blocks=12", "cost_samples=8",
]  # fmt: skip

_QUICK_COST = [
    "lengths=[10000, 200000]", "repeats=4", "approach_blocks=8", "processes=1", "reopenings=3",
    "ingest_repeats=3", "ingest_tokens=16384", "prefill_windows=4", "prefill_batches=[1, 4]",
    "refocuses=40", "prose_streams=1", "prose_history=4096", "prose_blocks=9",
    "recall_answers=5", "recall_history=4096",
]  # fmt: skip

_QUICK_PROOF = [
    "lengths=4k,16k", "far_lengths=", "questions=8", "slow_questions=4", "asked=1",
    "depth_questions=2", "prose=16k", "prose_points=24",
    "rivals=window,bm25,gists_only,megacontext,oracle",
]  # fmt: skip


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


def run_focus(arguments: argparse.Namespace) -> int:
    """Suite ``focus``."""
    named = {"lengths": arguments.lengths, "policies": arguments.policies}
    chosen = [f"{key}={value}" for key, value in named.items() if value is not None]
    arguments.overrides = [*chosen, *arguments.overrides]
    _be_quick(arguments, _QUICK_FOCUS)
    config = read_config(FocusSuiteConfig, arguments)
    with live_picture() as show:
        results = run_focus_suite(config, show, lambda text: console.print(text, markup=False))
    line = _finish(arguments, "focus", results, config.model, config.seed)
    if arguments.report is not None:
        for path in write_focus_report(line, arguments.report):
            console.print(f"wrote {path}")
    return 0


def run_cost(arguments: argparse.Namespace) -> int:
    """Suite ``cost``."""
    _be_quick(arguments, _QUICK_COST)
    config = read_config(CostSuiteConfig, arguments)
    with live_picture() as show:
        results = run_cost_suite(config, show)
    _finish(arguments, "cost", results, config.model, config.seed)
    return 0


def run_proof(arguments: argparse.Namespace) -> int:
    """Suite ``proof``."""
    _be_quick(arguments, _QUICK_PROOF)
    config = read_config(ProofSuiteConfig, arguments)
    with live_picture() as show:
        found = run_proof_suite(config, show)
    # The rivals' own rows, several for each of ours, are for the report.
    shown = {
        name: estimate
        for name, estimate in found.results.items()
        if not any(name.endswith(f".{rival}") for rival in config.names)
    }
    line = _finish(
        arguments,
        "proof",
        found.results,
        config.model,
        config.seed,
        shown=shown,
        **found.facts,
    )
    if arguments.report is not None:
        page = arguments.report / "proof.md"
        for path in write_proof_report(ProofLine.of(line), page, arguments.report):
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
    *,
    shown: Mapping[str, Estimate] | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """Prints the table, of ``shown`` or all results, and the JSON line, and returns the line."""
    table = Table(title=f"bench {suite}", title_justify="left")
    for column in ("measure", "value", "95 % interval", "n"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    for name, estimate in (results if shown is None else shown).items():
        interval = f"{estimate.low:.4g} – {estimate.high:.4g}" if estimate.n > 1 else ""
        table.add_row(name, f"{estimate.value:.4g}", interval, str(estimate.n))
    console.print(table)
    command = shlex.join(["megacontext", *arguments.words])
    line = suite_line(suite, results, model=model, seed=seed, command=command, **facts)
    if arguments.json is not None and arguments.json != "-":
        write_json(arguments.json, line)
    write_json("-", line)
    return line
