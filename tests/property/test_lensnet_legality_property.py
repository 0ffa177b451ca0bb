"""Legality against a reference that walks through one entry at a time."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megacontext.lensnet import Legality, entry_legality, mask_scores

ENTRIES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 300), st.booleans()), min_size=0, max_size=12
)


def slow_legality(level, index, real, cursor, tail_start, size):
    width = size if level == 0 else size**level
    start = index * width
    parent_level = level + 1
    parent_start = 0
    while parent_start + size**parent_level <= start:
        parent_start += size**parent_level
    parent_stop = parent_start + size**parent_level
    parent_exists = parent_stop <= cursor
    touches_tail = parent_stop > tail_start
    return real and level > 0, real and parent_exists and not touches_tail


@given(
    rows=ENTRIES,
    size=st.integers(2, 6),
    cursor=st.integers(0, 20_000),
    tail=st.integers(0, 2_000),
)
def test_legality_equals_the_slow_reference(rows, size, cursor, tail):
    tail_start = max(0, cursor - tail)
    widths = [size ** max(1, level) for level, _, _ in rows]
    starts = [index * width for (_, index, _), width in zip(rows, widths, strict=True)]
    got = entry_legality(
        torch.tensor([[level for level, _, _ in rows]], dtype=torch.int64),
        torch.tensor([starts], dtype=torch.int64),
        torch.tensor([[real for _, _, real in rows]], dtype=torch.bool),
        cursor=torch.tensor([cursor]),
        tail_start=torch.tensor([tail_start]),
        block_size=size,
    )
    want = [slow_legality(*row, cursor, tail_start, size) for row in rows]
    assert got.can_expand[0].tolist() == [expand for expand, _ in want]
    assert got.can_collapse[0].tolist() == [collapse for _, collapse in want]


@given(
    rows=st.lists(st.tuples(st.floats(-5, 5, width=32), st.booleans(), st.booleans()), max_size=20)
)
def test_masked_scores_ask_only_for_legal_moves(rows):
    scores = torch.tensor([[row[0] for row in rows]], dtype=torch.float32)
    legality = Legality(
        torch.tensor([[row[1] for row in rows]], dtype=torch.bool),
        torch.tensor([[row[2] for row in rows]], dtype=torch.bool),
    )
    for (score, expand, collapse), masked in zip(
        rows, mask_scores(scores, legality)[0].tolist(), strict=True
    ):
        if (score > 0 and expand) or (score < 0 and collapse):
            assert masked == score
        else:
            assert masked == 0
