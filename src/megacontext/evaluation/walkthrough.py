"""One session as a page: what the focus did, line by line and as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from megacontext.config import FrozenConfig
from megacontext.evaluation.figures import color_map, svg_pyplot
from megacontext.evaluation.focus_picture import finest_levels
from megacontext.evaluation.poc_loop import PocLoopConfig, run_poc_loop
from megacontext.runtime.focus_loop import FocusRecord

_COLORS = ("#f2b705", "#2a9d4a", "#2a8fbd", "#31508c", "#7b4b94", "#555555")
_NOTHING = "#ffffff"


class WalkthroughConfig(FrozenConfig):
    """Which session, and where its page goes.

    Attributes:
        loop: the session.
        output: the page; its picture lies beside it, under the same name.
        columns: stretches of the history that the picture tells apart.
    """

    loop: PocLoopConfig = PocLoopConfig()
    output: Path = Path("docs/walkthrough.md")
    columns: int = Field(default=240, ge=8)


@dataclass(frozen=True)
class Walked:
    """What a session left behind.

    Attributes:
        log: its lines.
        records: its refocuses.
        outcome: answers, edits and state.
    """

    log: Sequence[str]
    records: Sequence[FocusRecord]
    outcome: dict[str, Any]


def write_walkthrough(config: WalkthroughConfig) -> list[Path]:
    """Runs the session and writes page and picture.

    Returns:
        The files written.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = svg_pyplot()
    log: list[str] = []
    records: list[FocusRecord] = []
    outcome = run_poc_loop(config.loop, log.append, records.append)
    walked = Walked(log, records, outcome)
    picture = config.output.with_suffix(".svg")
    picture.parent.mkdir(parents=True, exist_ok=True)
    _draw(pyplot, walked, config.columns, picture)
    link = Path(os.path.relpath(picture, config.output.parent)).as_posix()
    config.output.write_text("\n".join([*_page(config, walked, link), ""]), encoding="utf-8")
    return [config.output, picture]


def levels_over_time(records: Sequence[FocusRecord], columns: int) -> Tensor:
    """The finest level in context after each refocus, by stretch of the final history.

    Returns:
        ``[rounds, columns]`` int64; -1 where history had not come so far yet.
    """
    total = max(record.cursor for record in records)
    return torch.stack([finest_levels(record.spans, total, columns) for record in records])


def _draw(pyplot: Any, walked: Walked, columns: int, path: Path) -> None:
    levels = levels_over_time(walked.records, columns)
    total = max(record.cursor for record in walked.records)
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    axes.imshow(
        levels.clamp(max=len(_COLORS) - 1).numpy() + 1,
        cmap=color_map((_NOTHING, *_COLORS)),
        vmin=0,
        vmax=len(_COLORS),
        aspect="auto",
        interpolation="nearest",
        extent=(0, total, len(levels), 0),
    )
    axes.set_xlabel("token of the history")
    axes.set_ylabel("refocus")
    top = int(levels.max())
    names = ["raw tokens", *(f"L{level} gists" for level in range(1, top + 1))]
    marks = [pyplot.Rectangle((0, 0), 1, 1, color=_COLORS[level]) for level in range(len(names))]
    figure.legend(marks, names, loc="outside upper center", ncols=len(names), frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _page(config: WalkthroughConfig, walked: Walked, picture: str) -> Iterator[str]:
    loop, state = config.loop, walked.outcome["state"]
    asked = walked.outcome["answers"]
    right = sum(each["answer"] == each["expected"] for each in asked)
    yield "# One session, step by step"
    yield ""
    yield "Made by `python -m tools.walkthrough`; do not edit by hand."
    yield ""
    yield f"The first {loop.characters:,} characters of a book, {state['cursor']:,} tokens, stream"
    yield f"through a window of {state['budget']} token-equivalents. {len(asked)} facts were"
    yield "planted in them and are asked for at the end, when hardly one of them is in the window"
    yield f"any more: {right} of {len(asked)} answers are right."
    yield ""
    yield f"![What is in the window after every refocus]({picture})"
    yield ""
    yield "Every row of the picture is the window after one refocus, from the oldest token of the"
    yield "history on the left to the newest on the right. While the text streams, what gets old"
    yield "becomes a gist, then a gist of gists: the band of raw tokens moves along with the"
    yield "stream. The last rows are the questions: the window starts from the coarsest view, and"
    yield "single blocks far back become raw again, with the chain of finer gists around them that"
    yield "leads there."
    yield ""
    yield "## The log"
    yield ""
    yield f"Every {loop.log_every}th refocus while the text streams, and all of every question. An"
    yield "edit tells its level, the tokens it covers, the score that asked for it, what it costs,"
    yield "and why it was made."
    yield ""
    yield "```text"
    yield from walked.log
    yield "```"
    yield ""
    yield f"{walked.outcome['edits']} edits while streaming, {state['rounds']} refocuses in all."
