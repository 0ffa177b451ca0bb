"""The focus as a picture in the terminal: which part of the history is how finely in context."""

from __future__ import annotations

import torch
from rich.text import Text
from torch import Tensor

# Level 0 (raw tokens) is brightest; coarser levels fade.
LEVEL_STYLES = ("bold bright_yellow", "green", "cyan", "blue", "magenta", "bright_black")
_GLYPHS = "█▓▒░·"


def finest_levels(spans: Tensor, total: int, columns: int) -> Tensor:
    """The finest level in context in each of ``columns`` equal stretches of ``[0, total)``.

    Args:
        spans: ``[n, 3]`` int64: level, start, end; a gapless tiling from 0.
        total: tokens that the full width stands for.
        columns: number of stretches.

    Returns:
        ``[columns]`` int64; -1 where a stretch lies wholly behind the last span.

    Raises:
        ValueError: ``total`` or ``columns`` is not positive.
    """
    if total <= 0 or columns <= 0:
        raise ValueError(f"{total} tokens cannot be shown in {columns} columns")
    levels, starts, ends = spans.unbind(1)
    # Stretch c covers [c, c + 1) * total / columns, so a span touches those from low to high.
    low = starts * columns // total
    high = (ends * columns + total - 1) // total - 1
    finest = torch.full((columns,), 99)
    order = torch.argsort(levels, descending=True, stable=True)
    counts = (high - low + 1)[order]
    index = torch.arange(int(counts.sum()))
    owner = torch.repeat_interleave(counts)
    column = low[order][owner] + index - (counts.cumsum(0) - counts)[owner]
    inside = (column >= 0) & (column < columns)
    finest.scatter_reduce_(0, column[inside], levels[order][owner][inside], "amin")
    return torch.where(finest == 99, -1, finest)


def focus_bar(spans: Tensor, total: int, columns: int) -> Text:
    """One line: a character per stretch of history, brighter and denser the finer it is."""
    bar = Text()
    for level in finest_levels(spans, total, columns).tolist():
        if level < 0:
            bar.append(" ")
        else:
            style = LEVEL_STYLES[min(level, len(LEVEL_STYLES) - 1)]
            bar.append(_GLYPHS[min(level, len(_GLYPHS) - 1)], style=style)
    return bar


def focus_legend(top_level: int) -> Text:
    """What the characters of :func:`focus_bar` mean."""
    legend = Text()
    for level in range(top_level + 1):
        glyph = _GLYPHS[min(level, len(_GLYPHS) - 1)]
        style = LEVEL_STYLES[min(level, len(LEVEL_STYLES) - 1)]
        legend.append(f"{glyph} ", style=style)
        legend.append("raw tokens   " if level == 0 else f"L{level} gist   ")
    return legend
