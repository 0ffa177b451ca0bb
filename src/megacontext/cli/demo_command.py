"""``megacontext demo``: a book streams through a small window."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from megacontext.cli.output import (
    check_writable,
    console,
    live_picture,
    read_config,
    write_json,
)
from megacontext.evaluation.demo import Answered, Demo, DemoConfig, DemoResult
from megacontext.evaluation.focus_picture import focus_bar, focus_legend
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.focus_loop import FocusRecord

_FRAME_EVERY = 16
_ARM_TITLES = {
    "megacontext": "MegaContext",
    "lexical": "BM25 focus",
    "window": "sliding window",
    "recency": "gists, no focus",
    "oracle": "oracle focus",
}


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo."""
    config = read_config(DemoConfig, arguments)
    check_writable("--html", arguments.html)
    base = BaseModel.from_pretrained(config.model)
    with _memory_folder(arguments.memory) as folder:
        demo = Demo(config, base, folder)
        console.print(
            f"[bold]{demo.total_tokens:,}[/] tokens of a book stream through a window of "
            f"[bold]{config.engine.budget:,}[/]; {len(demo.facts)} facts are hidden in it."
        )
        result = _stream_and_ask(demo)
        demo.write_playback(arguments.html, result)
        demo.memory.close()
    _print_result(result)
    console.print(f"The focus over time: [bold]{arguments.html}[/]")
    write_json(arguments.json, result.as_json())
    return 0


@contextmanager
def _memory_folder(kept: Path | None) -> Generator[Path]:
    if kept is not None:
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="megacontext-demo-") as folder:
        yield Path(folder) / "demo.mctx"


def _stream_and_ask(demo: Demo) -> DemoResult:
    with live_picture() as show:

        def on_record(record: FocusRecord, total: int) -> None:
            if record.round % _FRAME_EVERY == 0:
                show(_picture(record, total, demo.config.engine.budget))

        def on_answer(answered: Answered) -> None:
            record = demo.engine.focus.records[-1]
            show(
                Group(
                    _picture(record, demo.total_tokens, demo.config.engine.budget),
                    Text(f"asked: {answered.fact.question}"),
                    Text(f"answered: {answered.answers['megacontext'].strip()}"),
                )
            )

        return demo.run(on_record, on_answer)


def _picture(record: FocusRecord, total: int, budget: int) -> Group:
    columns = max(20, min(console.width - 2, 120))
    top = int(record.spans[:, 0].max())
    last = record.edits[-1] if record.edits else None
    edit = (
        f"{last.kind} L{last.level} [{last.start:,}, {last.end:,}): {last.score:+.2f} nats"
        if last
        else "no edit"
    )
    return Group(
        Text(f"{record.cursor:,} of {total:,} tokens read, {record.cost} of {budget} spent"),
        focus_bar(record.spans, total, columns),
        focus_legend(top),
        Text(f"refocus {record.round}: {len(record.edits)} edits, last: {edit}"),
    )


def _print_result(result: DemoResult) -> None:
    # A light frame leaves the question its place in 80 columns.
    table = Table(
        title="Planted facts, asked at the end of the book",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("question")
    table.add_column("token", justify="right")
    table.add_column("expected")
    for arm in result.arms:
        table.add_column(_ARM_TITLES.get(arm, arm))
    for item in result.answered:
        cells = [
            f"[{'green' if item.correct(arm) else 'red'}]{item.answers[arm].strip() or '–'}[/]"
            for arm in result.arms
        ]
        table.add_row(item.fact.question, f"{item.token:,}", item.fact.answer, *cells)
    asked = len(result.answered)
    table.add_section()
    totals = [f"[bold]{result.score(arm)} of {asked}[/]" for arm in result.arms]
    table.add_row("right", "", "", *totals)
    console.print(table)
    for arm, estimate in result.nll.items():
        console.print(
            f"NLL of the next 32 tokens, {_ARM_TITLES.get(arm, arm)}: {estimate.value:.3f} "
            f"nats/token (95 % {estimate.low:.3f} to {estimate.high:.3f}, n = {estimate.n})"
        )
    console.print(
        f"Full context: does not fit ({result.history_tokens:,} tokens, window {result.budget:,})."
    )
    console.print(
        f"Focus: {result.edits:,} edits, swap rate {result.swap_rate:.3f}, residency "
        f"{result.residency:.1f} rounds, {result.utilization:.0%} of the budget used."
    )
