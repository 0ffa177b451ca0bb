"""The focus over time as one self-contained HTML page with a slider and a play button."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megacontext.errors import InputError
from megacontext.runtime.focus_loop import FocusRecord


@dataclass(frozen=True)
class Frame:
    """One picture of the playback.

    Attributes:
        title: what happens in it.
        record: the refocus it shows.
    """

    title: str
    record: FocusRecord


def playback_html(
    frames: Sequence[Frame],
    *,
    title: str,
    total_tokens: int,
    budget: int,
    marks: Sequence[int] = (),
) -> str:
    """The page.

    Args:
        frames: in order of time.
        title: heading of the page.
        total_tokens: tokens that the full width stands for.
        budget: ``W``.
        marks: tokens to point at, for example planted facts.

    Raises:
        InputError: there is no frame.
    """
    if not frames:
        raise InputError(f"playback {title!r}: there is no frame; refocus at least once")
    data = {
        "title": title,
        "total": total_tokens,
        "budget": budget,
        "marks": list(marks),
        "frames": [_frame(frame) for frame in frames],
    }
    page = resources.files("megacontext").joinpath("assets/focus_playback.html").read_text("utf-8")
    # "</script>" or "<!--" would end or extend the script element wherever they stood in a title.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return page.replace("__DATA__", text)


def write_playback(
    path: Path,
    frames: Sequence[Frame],
    *,
    title: str,
    total_tokens: int,
    budget: int,
    marks: Sequence[int] = (),
) -> None:
    """Writes :func:`playback_html` to a file.

    Raises:
        InputError: there is no frame, or the file cannot be written.
    """
    page = playback_html(frames, title=title, total_tokens=total_tokens, budget=budget, marks=marks)
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


def _frame(frame: Frame) -> dict[str, object]:
    record = frame.record
    return {
        "title": frame.title,
        "round": record.round,
        "cursor": record.cursor,
        "cost": record.cost,
        "spans": record.spans.tolist(),
        "edits": [
            [edit.kind, edit.level, edit.start, edit.end, round(edit.score, 3), edit.reason]
            for edit in record.edits
        ],
    }
