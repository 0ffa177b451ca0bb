from __future__ import annotations

import random
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from window_reference import contexts, cost_of, spans_of

from megacontext.runtime.focus_allocator import AllocatorConfig, FocusAllocator
from megacontext.runtime.focus_metrics import FocusMeter
from megacontext.runtime.focus_scores import AllocatorState, FocusScores
from megacontext.runtime.working_context import WorkingContext


def assert_legal(context: WorkingContext) -> None:
    """The invariants once more, entry by entry and without the code under test."""
    k, position = context.block_size, 0
    for level, start, end in spans_of(context):
        assert start == position < end
        if level:
            assert end - start == k**level
            assert start % k**level == 0
            assert end <= max(0, context.cursor - context.tail_tokens)
        else:
            assert start % k == 0
            assert end == min(start + k, context.cursor)
        position = end
    assert position == context.cursor
    assert cost_of(spans_of(context), context.gist_cost) <= context.budget


def test_ten_thousand_random_refocus_rounds_keep_every_invariant():
    rng = random.Random(7)
    torch.manual_seed(7)
    config = AllocatorConfig(max_edits=4, headroom=4, cooldown=1, move_budget=40)
    allocator, state, meter = FocusAllocator(config), AllocatorState.initial(), FocusMeter()
    context = WorkingContext.initial(10, block_size=4, gist_cost=1, budget=72, tail_tokens=6)
    kinds: set[str] = set()
    for _ in range(10_000):
        context = context.extend(rng.randint(0, 4))
        n_blocks = -(-context.cursor // 4)
        scores = FocusScores(
            torch.randint(0, n_blocks, (3,)),
            torch.randn(3),
            torch.randn(len(context)),
            torch.randn(len(context)),
        )
        plan = allocator.plan(context, scores, state, reserve=rng.choice((0, 0, 5)))
        assert_legal(plan.context)
        assert plan.context.cursor == context.cursor
        meter.observe(context, plan)
        kinds.update(edit.reason for edit in plan.edits)
        context, state = plan.context, plan.state
    assert kinds == {"proposal", "utility", "room", "payment", "threshold"}
    assert context.top_level >= 6
    assert state.levels.numel() <= 40
    assert 0 < meter.swap_rate < 1
    assert meter.residency > 1
    assert 0.5 < meter.utilization <= 1


def constant_scores(context: WorkingContext, worth: list[float], proposals) -> FocusScores:
    """Scores that depend on spans alone: opening gist g is worth ``worth[hash of g]``."""
    k = context.block_size

    def node(level: int, start: int) -> float:
        return worth[(level * 7 + start // k**level) % len(worth)]

    keep, expand = [], []
    for level, start, _ in spans_of(context):
        parent = start // k ** (level + 1) * k ** (level + 1)
        keep.append(node(level + 1, parent) / (k if level else 1))
        expand.append(node(level, start) if level else 0.0)
    blocks = torch.tensor([block for block, _ in proposals], dtype=torch.int64)
    utility = torch.tensor([value for _, value in proposals], dtype=torch.float32)
    return FocusScores(blocks, utility, torch.tensor(keep), torch.tensor(expand))


@given(
    contexts(max_cursor=150),
    st.lists(st.floats(0, 3, width=16), min_size=5, max_size=30),
    st.lists(st.tuples(st.integers(0, 99), st.floats(0, 3, width=16)), max_size=4),
    st.integers(0, 25),
    st.integers(0, 2),
    st.sampled_from([2, 8, 100]),
)
def test_constant_scores_come_to_rest(context, worth, proposals, spare, cooldown, max_edits):
    if context.cursor == 0:
        return
    n_blocks = -(-context.cursor // context.block_size)
    proposals = [(block % n_blocks, value) for block, value in proposals]
    context = replace(context, budget=context.coarsest_cost + spare + 2)
    config = AllocatorConfig(headroom=2, cooldown=cooldown, max_edits=max_edits)
    allocator, state = FocusAllocator(config), AllocatorState.initial()
    quiet = 0
    for _ in range(300):
        plan = allocator.plan(context, constant_scores(context, worth, proposals), state)
        context, state = plan.context, plan.state
        quiet = 0 if plan.edits else quiet + 1
        if quiet > cooldown:
            return  # the state has forgotten all edits, so every later plan is this one
    raise AssertionError("constant scores still cause edits after 300 rounds")


@given(contexts(max_cursor=200), st.lists(st.integers(0, 99), max_size=5), st.integers(0, 3))
def test_with_room_for_all_proposals_the_second_plan_is_empty(context, blocks, cooldown):
    if context.cursor == 0:
        return
    n_blocks = -(-context.cursor // context.block_size)
    proposals = torch.tensor(blocks, dtype=torch.int64) % n_blocks
    config = AllocatorConfig(max_edits=100, headroom=0, cooldown=cooldown, move_budget=10_000)
    allocator, state = FocusAllocator(config), AllocatorState.initial()
    for turn in range(3):
        unknown = torch.zeros(len(context))
        scores = FocusScores(proposals, torch.ones(len(blocks)), unknown, unknown)
        plan = allocator.plan(context, scores, state)
        context, state = plan.context, plan.state
        levels = context.levels[context.indices_of(proposals * context.block_size)]
        assert not levels.any()
        assert turn == 0 or not plan.edits
