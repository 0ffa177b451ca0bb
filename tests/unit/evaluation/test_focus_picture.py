from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.evaluation.focus_picture import (
    LEVEL_STYLES,
    finest_levels,
    focus_bar,
    focus_legend,
)


def looped(spans, total, columns):
    """Column by column, in exact fractions."""
    found = []
    for column in range(columns):
        start = Fraction(column * total, columns)
        end = Fraction((column + 1) * total, columns)
        touching = [level for level, low, high in spans if low < end and start < high]
        found.append(min(touching, default=-1))
    return found


@st.composite
def tilings(draw):
    """Gapless spans from 0, and a total at or beyond their end."""
    spans, end = [], 0
    for level, width in draw(
        st.lists(st.tuples(st.integers(0, 6), st.integers(1, 40)), max_size=12)
    ):
        spans.append((level, end, end + width))
        end += width
    return spans, max(1, end + draw(st.integers(0, 50)))


@settings(max_examples=60)
@given(tiling=tilings(), columns=st.integers(1, 40))
def test_finest_levels_equal_a_loop(tiling, columns):
    spans, total = tiling
    tensor = torch.tensor(spans, dtype=torch.int64).reshape(-1, 3)
    found = finest_levels(tensor, total, columns)
    assert found.dtype == torch.int64
    assert found.tolist() == looped(spans, total, columns)


def test_a_span_of_no_tokens_is_not_seen():
    spans = torch.tensor([[2, 0, 64], [0, 64, 64]])
    assert finest_levels(spans, 64, 4).tolist() == [2] * 4
    assert finest_levels(torch.tensor([[0, 0, 0]]), 10, 3).tolist() == [-1] * 3


def test_billions_of_tokens_fit():
    end = 10**9
    spans = torch.tensor([[5, 0, end - 32], [0, end - 32, end]])
    assert finest_levels(spans, end, 80).tolist() == [5] * 79 + [0]


@pytest.mark.parametrize(("total", "columns"), [(0, 10), (-1, 10), (10, 0)])
def test_nothing_to_show_is_refused(total, columns):
    with pytest.raises(ValueError, match="cannot be shown"):
        finest_levels(torch.tensor([[0, 0, 1]]), total, columns)


def test_the_bar_has_a_character_per_column_and_a_style_per_level():
    spans = torch.tensor([[2, 0, 40], [1, 40, 60], [0, 60, 80]])
    bar = focus_bar(spans, 100, 10)
    assert bar.plain == "▒▒▒▒▓▓██  "
    assert [str(span.style) for span in bar.spans] == [
        LEVEL_STYLES[level] for level in (2, 2, 2, 2, 1, 1, 0, 0)
    ]


def test_levels_beyond_the_last_style_look_like_it():
    bar = focus_bar(torch.tensor([[9, 0, 10]]), 10, 2)
    assert bar.plain == "··"
    assert str(bar.spans[0].style) == LEVEL_STYLES[-1]


def test_the_legend_names_every_level():
    assert focus_legend(2).plain.split() == ["█", "raw", "tokens", "▓", "L1", "gist", "▒", "L2",
                                            "gist"]  # fmt: skip
