from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from window_reference import (
    children_of,
    coarsest,
    contexts,
    cost_of,
    groups_of,
    parent_of,
    replaced,
    spans_of,
)

from megacontext.errors import InvariantError
from megacontext.runtime.working_context import WorkingContext


@given(
    k=st.integers(2, 5),
    cursor=st.integers(0, 3000),
    tail=st.integers(0, 100),
    data=st.data(),
)
def test_initial_is_the_brute_force_coarsest_tiling(k, cursor, tail, data):
    s = data.draw(st.integers(1, k - 1))
    context = WorkingContext.initial(
        cursor, block_size=k, gist_cost=s, budget=9000, tail_tokens=tail
    )
    assert spans_of(context) == coarsest(cursor, k, tail)
    assert context.cost == context.coarsest_cost == cost_of(spans_of(context), s)


@given(contexts())
def test_every_tiling_collapses_to_the_coarsest(context):
    while context.sibling_groups.first.numel():
        context = context.collapse_groups(torch.arange(context.sibling_groups.first.numel()))
        context.check()
    assert spans_of(context) == coarsest(context.cursor, context.block_size, context.tail_tokens)


@given(contexts())
def test_masks_and_groups_match_the_naive_ones(context):
    spans, k = spans_of(context), context.block_size
    naive = groups_of(spans, k, context.cursor, context.tail_tokens)
    groups = context.sibling_groups
    assert context.legal_expand.tolist() == [level > 0 for level, _, _ in spans]
    members = {child for _, children in naive for child in children}
    assert context.legal_collapse.tolist() == [span in members for span in spans]
    rows = torch.stack((groups.levels, groups.starts, groups.ends), dim=1).tolist()
    assert [tuple(row) for row in rows] == [parent for parent, _ in naive]
    assert groups.size.tolist() == [len(children) for _, children in naive]
    s = context.gist_cost
    assert groups.freed.tolist() == [cost_of(c, s) - s for _, c in naive]
    values = torch.arange(len(context), dtype=torch.float64) ** 2
    where = {span: float(value) for span, value in zip(spans, values, strict=True)}
    assert groups.sums(values).tolist() == [sum(where[c] for c in cs) for _, cs in naive]


@given(contexts(), st.data())
def test_expand_and_collapse_are_atomic_and_inverse(context, data):
    spans, k = spans_of(context), context.block_size
    for index in range(len(context)):
        if context.levels[index] == 0:
            with pytest.raises(InvariantError, match="raw"):
                context.expand(index)
            continue
        opened = context.expand(index).check()
        assert spans_of(opened) == replaced(spans, [spans[index]], children_of(spans[index], k))
        sibling = index + data.draw(st.integers(0, len(opened) - len(context)))
        assert spans_of(opened.collapse(sibling).check()) == spans


@given(contexts())
def test_collapse_takes_the_whole_group_and_expand_brings_it_back(context):
    spans, k = spans_of(context), context.block_size
    legal = context.legal_collapse.tolist()
    for index, span in enumerate(spans):
        if not legal[index]:
            with pytest.raises(InvariantError, match="cannot collapse"):
                context.collapse(index)
            continue
        parent = parent_of(span, k)
        closed = context.collapse(index).check()
        assert spans_of(closed) == replaced(spans, children_of(parent, k), [parent])
        assert spans_of(closed.expand(closed.index_of(span[1]))) == spans


@given(contexts(), st.data())
def test_collapsing_groups_together_equals_one_by_one(context, data):
    groups = context.sibling_groups
    n_groups = groups.first.numel()
    chosen = data.draw(st.lists(st.integers(0, max(0, n_groups - 1)), unique=True))
    chosen = chosen if n_groups else []
    one_by_one = context
    for group in chosen:
        index = one_by_one.index_of(int(groups.starts[group]))
        one_by_one = one_by_one.collapse(index)
    together = context.collapse_groups(torch.tensor(chosen, dtype=torch.int64)).check()
    assert spans_of(together) == spans_of(one_by_one)


@given(contexts(), st.data())
def test_chain_cost_is_what_reveal_adds(context, data):
    n_blocks = -(-context.cursor // context.block_size)
    blocks = torch.arange(n_blocks)
    costs = context.chain_costs(blocks).tolist()
    for block in range(n_blocks):
        revealed = context.reveal(block).check()
        token = block * context.block_size
        assert int(revealed.levels[revealed.index_of(token)]) == 0
        assert revealed.cost - context.cost == costs[block] == context.chain_cost(block)


@given(contexts(), st.data())
def test_open_to_equals_repeated_expands(context, data):
    if context.cursor == 0:
        return
    token = data.draw(st.integers(0, context.cursor - 1))
    level = data.draw(st.integers(0, 4))
    step = context
    while int(step.levels[step.index_of(token)]) > level:
        step = step.expand(step.index_of(token))
    opened = context.open_to(token, level)
    assert spans_of(opened) == spans_of(step)
    price = context.open_costs(torch.tensor([token]), torch.tensor([level]))
    assert opened.cost - context.cost == int(price)


@given(contexts(), st.lists(st.integers(0, 30), max_size=6))
def test_extend_keeps_every_invariant_but_the_budget(context, steps):
    for n_tokens in steps:
        longer = context.extend(n_tokens).check(budget=False)
        assert longer.cursor == context.cursor + n_tokens
        assert longer.cost == context.cost + n_tokens
        old = [span for span in spans_of(context) if span[2] % context.block_size == 0]
        assert spans_of(longer)[: len(old)] == old
        context = longer


@given(contexts(), st.integers(0, 600), st.data())
def test_positions_grow_by_rows_and_keep_recent_distances(context, spare, data):
    rows_per_gist = data.draw(st.integers(1, context.gist_cost))
    rows = context.widths.masked_fill(context.levels > 0, rows_per_gist)
    total = int(rows.sum())
    limit = total + spare
    packed = context.positions("packed", limit, rows_per_gist=rows_per_gist)
    timeline = context.positions("timeline", limit, rows_per_gist=rows_per_gist)
    assert packed.tolist() == (rows.cumsum(0) - rows).tolist()
    gists_first = context.positions("gists_first", limit, rows_per_gist=rows_per_gist)
    order = sorted(range(len(context)), key=lambda i: (int(context.levels[i]) == 0, i))
    at = 0
    for entry in order:
        assert int(gists_first[entry]) == at
        at += int(rows[entry])
    for first in (packed, timeline):
        assert bool((first[1:] >= (first + rows)[:-1]).all())
        assert bool(((first >= 0) & (first + rows <= max(limit, 0))).all())
    true_distance = context.cursor - context.starts
    now = min(context.cursor, limit)
    capped = now - timeline
    assert bool((capped <= true_distance).all())
    if context.cursor <= limit:
        assert timeline.tolist() == context.starts.tolist()
    elif len(context) and int(context.levels[-1]) == 0:
        assert int(capped[-1]) == int(true_distance[-1])


@given(contexts())
def test_index_of_finds_the_covering_entry(context):
    spans = spans_of(context)
    found = context.indices_of(torch.arange(context.cursor)).tolist()
    for token, index in enumerate(found):
        assert spans[index][1] <= token < spans[index][2]
