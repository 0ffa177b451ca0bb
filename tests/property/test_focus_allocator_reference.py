from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from window_reference import ReferenceAllocator, contexts, spans_of

from megacontext.errors import ConfigError
from megacontext.runtime.focus_allocator import AllocatorConfig, FocusAllocator
from megacontext.runtime.focus_scores import AllocatorState, FocusScores
from megacontext.runtime.working_context import WorkingContext

# Multiples of 1/8: their sums are exact, so that ties in the reference are ties in tensors, too.
utilities = st.integers(-8, 24).map(lambda eighths: eighths / 8)


@st.composite
def configs(draw) -> AllocatorConfig:
    return AllocatorConfig(
        max_edits=draw(st.sampled_from([0, 1, 2, 5, 200])),
        expand_threshold=draw(st.sampled_from([0.125, 1.0])),
        collapse_threshold=draw(st.sampled_from([-0.5, 0.0, 0.0625])),
        swap_margin=draw(st.sampled_from([0.0, 0.25])),
        cooldown=draw(st.integers(0, 3)),
        competition=draw(st.sampled_from(["softmax", "greedy"])),
        temperature=draw(st.sampled_from([0.1, 1.0, 30.0])),
        move_budget=draw(st.sampled_from([4, 20, 10_000])),
        headroom=draw(st.integers(0, 4)),
        spare_share=draw(st.sampled_from([0.0, 0.1, 0.5])),
    )


@st.composite
def scores_for(draw, context: WorkingContext) -> FocusScores:
    n, n_blocks = len(context), -(-context.cursor // context.block_size)
    blocks = draw(st.lists(st.integers(0, n_blocks - 1), max_size=8)) if n_blocks else []
    columns = st.lists(utilities, min_size=n, max_size=n)
    worth = draw(st.lists(utilities, min_size=len(blocks), max_size=len(blocks)))
    return FocusScores(
        torch.tensor(blocks, dtype=torch.int64),
        torch.tensor(worth, dtype=torch.float32),
        torch.tensor(draw(columns), dtype=torch.float32),
        torch.tensor(draw(columns), dtype=torch.float32),
    )


@st.composite
def states_for(draw, context: WorkingContext) -> AllocatorState:
    """A state that remembers edits of some gists of the present tree, up to four rounds ago."""
    k = context.block_size
    nodes: list[tuple[int, int, int]] = []
    if context.top_level:
        for _ in range(draw(st.integers(0, 4))):
            level = draw(st.integers(1, context.top_level))
            index = draw(st.integers(0, context.cursor // k**level - 1))
            nodes.append((level, index * k**level, draw(st.integers(6, 9))))
    columns = torch.tensor(nodes, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return AllocatorState(9, *columns)


@st.composite
def rounds(draw):
    context = draw(contexts(max_cursor=200))
    config = draw(configs())
    reserve = draw(st.integers(0, 6))
    least = max(1, context.coarsest_cost + reserve + config.headroom)
    context = replace(context, budget=least + draw(st.integers(0, 30)))
    scores, state = draw(scores_for(context)), draw(states_for(context))
    return context, scores, state, config, reserve


@given(rounds())
def test_plan_matches_the_plain_reference(case):
    context, scores, state, config, reserve = case
    plan = FocusAllocator(config).plan(context, scores, state, reserve)
    nodes = zip(state.levels.tolist(), state.starts.tolist(), state.rounds.tolist(), strict=True)
    cooling = {(level, start) for level, start, then in nodes if 10 - then <= config.cooldown}
    reference = ReferenceAllocator(context, scores, config, cooling)
    edits, spans = reference.plan(context.budget - reserve - config.headroom)
    made = [(e.kind, (e.level, e.start, e.end), e.cost_change, e.reason) for e in plan.edits]
    assert made == edits
    assert spans_of(plan.context) == spans


@given(rounds())
def test_plan_keeps_its_promises(case):
    context, scores, state, config, reserve = case
    plan = FocusAllocator(config).plan(context, scores, state, reserve)
    plan.context.check()
    assert plan.context.cost <= context.budget - reserve - config.headroom
    assert plan.context.cost == context.cost + sum(edit.cost_change for edit in plan.edits)
    counted = [edit for edit in plan.edits if edit.reason != "room"]
    assert len(counted) <= config.max_edits
    moving = [edit for edit in counted if edit.reason != "payment"]
    assert sum(abs(edit.cost_change) for edit in moving) <= config.move_budget
    steps = [step for edit in plan.edits for step in edit.steps]
    assert len(steps) == len(set(steps))
    assert plan.state.round == state.round + 1
    for edit in plan.edits:
        assert (edit.cost_change > 0) == (edit.kind == "expand")
        assert edit.kind == "collapse" or edit.score >= config.expand_threshold
        assert edit.reason != "threshold" or edit.score < config.collapse_threshold


@given(rounds())
def test_cooling_spans_are_edited_for_room_only(case):
    context, scores, state, config, reserve = case
    plan = FocusAllocator(config).plan(context, scores, state, reserve)
    cooling = {
        (level, start)
        for level, start, then in zip(
            state.levels.tolist(), state.starts.tolist(), state.rounds.tolist(), strict=True
        )
        if 10 - then <= config.cooldown
    }
    for edit in plan.edits:
        assert edit.reason == "room" or not cooling.intersection(edit.steps)


@given(rounds(), st.randoms(use_true_random=False))
def test_the_order_of_proposals_changes_nothing(case, random):
    context, scores, state, config, reserve = case
    order = list(range(scores.proposal_blocks.numel()))
    random.shuffle(order)
    doubled = order + order[:2]
    shuffled = replace(
        scores,
        proposal_blocks=scores.proposal_blocks[doubled],
        proposal_utility=scores.proposal_utility[doubled],
    )
    allocator = FocusAllocator(config)
    assert (
        allocator.plan(context, shuffled, state, reserve).edits
        == allocator.plan(context, scores, state, reserve).edits
    )


@given(contexts(max_cursor=200), st.integers(0, 5), st.integers(0, 5), st.integers(0, 9))
def test_room_is_made_exactly_when_the_coarsest_tiling_fits(context, reserve, headroom, spare):
    assume(context.coarsest_cost + reserve + headroom > 6)
    allocator = FocusAllocator(AllocatorConfig(headroom=headroom))
    scores, state = FocusScores.unknown(len(context)), AllocatorState.initial()
    least = context.coarsest_cost + reserve + headroom
    plan = allocator.make_room(replace(context, budget=least + spare), scores, state, reserve)
    assert plan.context.cost <= plan.context.budget - reserve - headroom
    assert all(edit.reason == "room" for edit in plan.edits)
    assert plan.state is state
    with pytest.raises(ConfigError, match="raise budget"):
        allocator.make_room(replace(context, budget=least - 1), scores, state, reserve)
