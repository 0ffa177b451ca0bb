"""Windows are laid out as a loop over their blocks would do it, entry by entry."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.errors import InputError
from megacontext.runtime.window_layout import WindowLayout, legal_windows, substitution_patterns


def laid_out(levels, size, slots):
    """One window: its tokens, positions, gists, their levels and positions, and gists seen."""
    tokens, positions, gists, gist_levels, gist_positions, seen = [], [], [], [], [], []
    here = 0
    block = 0
    while block < len(levels):
        if levels[block] == 0:
            for token in range(block * size, (block + 1) * size):
                tokens.append(token)
                positions.append(here)
                seen.append(len(gists))
                here += 1
            block += 1
            continue
        gist_levels.append(levels[block])
        # Gists of level 2 are numbered behind all of level 1, and cover `size` blocks.
        gists.append(block if levels[block] == 1 else len(levels) + block // size)
        for _ in range(slots):
            gist_positions.append(here)
            here += 1
        block += 1 if levels[block] == 1 else size
    return tokens, positions, gists, gist_levels, gist_positions, seen


@st.composite
def windows(draw):
    """Windows with equally many raw blocks, level-1 gists and level-2 gists, shuffled."""
    size = draw(st.integers(2, 4))
    spans = draw(st.integers(0, 3))
    deep = draw(st.integers(0, spans))
    free = (spans - deep) * size + draw(st.integers(0, size - 1))
    gists = draw(st.integers(0, free))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        is_deep = draw(st.permutations([True] * deep + [False] * (spans - deep)))
        others = iter(draw(st.permutations([1] * gists + [0] * (free - gists))))
        row = []
        for span in is_deep:
            row += [2] * size if span else list(itertools.islice(others, size))
        rows.append(row + list(others))
    return rows, size


@settings(max_examples=150)
@given(drawn=windows(), slots=st.integers(1, 5))
def test_a_layout_is_what_a_loop_over_the_blocks_gives(drawn, slots):
    rows, size = drawn
    layout = WindowLayout.of(torch.tensor(rows).long(), block_size=size, slots=slots)
    wanted = [laid_out(row, size, slots) for row in rows]
    found = (layout.tokens, layout.positions, layout.gists, layout.gist_levels,
             layout.gist_positions, layout.seen)  # fmt: skip
    for index, tensor in enumerate(found):
        assert tensor.dtype == torch.int64
        assert tensor.tolist() == [window[index] for window in wanted]
    assert layout.n_gists == len(wanted[0][2])


@settings(max_examples=60)
@given(drawn=windows(), slots=st.integers(1, 5))
def test_every_position_is_taken_once(drawn, slots):
    rows, size = drawn
    layout = WindowLayout.of(torch.tensor(rows).long(), block_size=size, slots=slots)
    for raw, gists in zip(layout.positions.tolist(), layout.gist_positions.tolist(), strict=True):
        assert sorted(raw + gists) == list(range(len(raw) + len(gists)))


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ([[0, 3]], r"levels must be \[batch, blocks\] of 0, 1 or 2, got \(1, 2\)"),
        ([[0, -1]], "of 0, 1 or 2"),
        ([0, 1], r"got \(2,\)"),
        ([[2, 0]], "level 2 must cover whole spans of 2 blocks"),
        ([[0, 2, 2, 0]], "level 2 must cover whole spans of 2 blocks"),
        ([[0, 0, 2]], "level 2 must cover whole spans of 2 blocks"),
        ([[2]], "level 2 must cover whole spans of 2 blocks"),
        ([[0, 1], [0, 0]], r"equally many raw blocks: \[1, 2\]"),
        ([[2, 2, 0], [1, 1, 0]], r"equally many gists: \[1, 2\]"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(levels, message):
    with pytest.raises(InputError, match=message):
        WindowLayout.of(torch.tensor(levels), block_size=2, slots=1)


@given(n=st.integers(0, 12), width=st.integers(1, 14), align=st.integers(1, 5))
def test_legal_windows_are_all_there_are(n, width, align):
    wanted = [
        list(range(start, start + width)) for start in range(0, n, align) if start + width <= n
    ]
    found = legal_windows(n, width, align)
    assert found.dtype == torch.int64
    assert found.shape == (len(wanted), width)
    assert found.tolist() == wanted


@pytest.mark.parametrize(("width", "align"), [(0, 1), (3, 0), (-1, 1)])
def test_windows_of_no_width_are_refused(width, align):
    with pytest.raises(InputError, match=f"width is {width} and align {align}"):
        legal_windows(5, width, align)


@st.composite
def blocks(draw):
    n = draw(st.integers(0, 8))
    keep = draw(st.integers(0, n))
    return n, keep, draw(st.integers(0, n - keep))


@given(drawn=blocks())
def test_patterns_are_all_choices_in_order(drawn):
    n, keep, replaced = drawn
    patterns = substitution_patterns(n, replaced, keep_last=keep)
    wanted = [
        [int(block in chosen) for block in range(n)]
        for chosen in itertools.combinations(range(n - keep), replaced)
    ]
    assert patterns.dtype == torch.int64
    assert patterns.shape == (len(wanted), n)
    assert patterns.tolist() == wanted


@settings(max_examples=40)
@given(drawn=blocks(), share=st.floats(0.1, 0.9), seed=st.integers(0, 2**31))
def test_too_many_patterns_are_sampled(drawn, share, seed):
    n, keep, replaced = drawn
    limit = max(1, int(math.comb(n - keep, replaced) * share))
    drawn_twice = [
        substitution_patterns(
            n,
            replaced,
            keep_last=keep,
            limit=limit,
            generator=torch.Generator().manual_seed(seed),
        )
        for _ in range(2)
    ]
    assert torch.equal(*drawn_twice)
    assert drawn_twice[0].shape == (limit, n)
    for pattern in drawn_twice[0].tolist():
        assert sum(pattern) == replaced
        assert set(pattern) <= {0, 1}
        assert sum(pattern[n - keep :]) == 0


def test_samples_reach_every_pattern():
    drawn = {
        tuple(pattern)
        for seed in range(30)
        for pattern in substitution_patterns(
            7, 3, keep_last=1, limit=19, generator=torch.Generator().manual_seed(seed)
        ).tolist()
    }
    assert len(drawn) == math.comb(6, 3)


@pytest.mark.parametrize(
    ("n", "replaced", "keep"), [(4, 5, 0), (4, 4, 1), (4, -1, 0), (2, 0, 3), (4, 1, -1)]
)
def test_patterns_that_do_not_exist_are_refused(n, replaced, keep):
    with pytest.raises(InputError, match=f"cannot replace {replaced} of {n - keep} blocks"):
        substitution_patterns(n, replaced, keep_last=keep)
