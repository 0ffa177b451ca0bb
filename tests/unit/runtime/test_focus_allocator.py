from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megacontext.errors import ConfigError, InputError, InvariantError
from megacontext.runtime.focus_allocator import AllocatorConfig, FocusAllocator
from megacontext.runtime.focus_scores import AllocatorState, FocusPlan, FocusScores
from megacontext.runtime.working_context import WorkingContext

START = AllocatorState.initial()


def window(cursor: int = 264, budget: int = 100, reveal: tuple[int, ...] = ()) -> WorkingContext:
    """K = 4, S = 1, a tail of two blocks; by default one level-4 gist and the tail."""
    context = WorkingContext.initial(
        cursor, block_size=4, gist_cost=1, budget=budget, tail_tokens=8
    )
    for block in reveal:
        context = context.reveal(block)
    return context


def scores(
    context: WorkingContext,
    proposals: dict[int, float] | None = None,
    keep: dict[int, float] | None = None,
    expand: dict[int, float] | None = None,
) -> FocusScores:
    """Scores by block (proposals) and by first token of the entry (keep, expand)."""
    proposals = proposals or {}
    unknown = FocusScores.unknown(len(context))
    entry, opened = unknown.entry_utility.clone(), unknown.expand_utility.clone()
    for values, target in ((keep or {}, entry), (expand or {}, opened)):
        for token, value in values.items():
            target[context.index_of(token)] = value
    return FocusScores(
        torch.tensor(list(proposals), dtype=torch.int64),
        torch.tensor(list(proposals.values()), dtype=torch.float32),
        entry,
        opened,
    )


def allocator(**changes: object) -> FocusAllocator:
    still = {"headroom": 0, "cooldown": 0, "spare_share": 0}
    return FocusAllocator(AllocatorConfig.parse(still | changes))


def summary(plan: FocusPlan) -> list[tuple[str, str, int, int]]:
    return [(edit.kind, edit.reason, edit.level, edit.start) for edit in plan.edits]


def level_of_block(context: WorkingContext, block: int) -> int:
    return int(context.levels[context.index_of(block * context.block_size)])


def test_nothing_known_changes_nothing():
    context = window(reveal=(3, 40))
    plan = allocator().plan(context, FocusScores.unknown(len(context)), START)
    assert plan.edits == ()
    assert torch.equal(plan.context.spans(), context.spans())
    assert plan.state.round == 1


def test_a_proposal_deep_in_the_tree_is_one_edit_with_all_its_steps():
    context = window()
    plan = allocator().plan(context, scores(context, {41: 0.5}), START)
    (edit,) = plan.edits
    assert (edit.kind, edit.reason, edit.score) == ("expand", "proposal", 0.5)
    assert (edit.level, edit.start, edit.end) == (4, 0, 256)
    assert edit.steps == ((4, 0), (3, 128), (2, 160), (1, 164))
    assert edit.cost_change == 4 * 3 == plan.context.cost - context.cost
    assert level_of_block(plan.context, 41) == 0


def test_a_gist_asks_for_its_children_only():
    context = window()
    plan = allocator().plan(context, scores(context, expand={0: 0.5}), START)
    assert summary(plan) == [("expand", "utility", 4, 0)]
    assert plan.context.levels.tolist() == [3, 3, 3, 3, 0, 0]


def test_a_level_one_gist_and_a_proposal_for_its_block_are_one_request():
    context = window(cursor=24)
    wanted = scores(context, {1: 0.2}, expand={4: 0.7})
    context = context.expand(0)
    wanted = scores(context, {1: 0.2}, expand={4: 0.7})
    plan = allocator().plan(context, wanted, START)
    assert summary(plan) == [("expand", "proposal", 1, 4)]
    assert plan.edits[0].score == pytest.approx(0.7)


def test_expands_below_the_threshold_are_not_considered():
    context = window()
    plan = allocator(expand_threshold=0.5).plan(context, scores(context, {3: 0.49}), START)
    assert plan.edits == ()
    assert allocator(expand_threshold=0.5).plan(context, scores(context, {3: 0.5}), START).edits


def test_siblings_share_their_chain():
    context = window()
    plan = allocator().plan(context, scores(context, {41: 0.5, 40: 0.4}), START)
    assert [edit.cost_change for edit in plan.edits] == [12, 3]
    assert plan.edits[1].steps == ((1, 160),)


@pytest.mark.parametrize("competition", ["softmax", "greedy"])
def test_equal_requests_go_to_the_newer_span(competition):
    context = window()
    plan = allocator(max_edits=1, competition=competition).plan(
        context, scores(context, {2: 0.5, 50: 0.5, 33: 0.5}), START
    )
    assert plan.edits[0].steps[-1] == (1, 200)


def test_competition_weighs_utility_against_cost():
    # Block 3 lies under an open level-1 gist (3 token-equivalents), block 40 under a level 3 (9).
    context = window(reveal=(2,))
    request = scores(context, {3: 1.0, 40: 2.0})
    first = {
        name: config.plan(context, request, START).edits[0].steps[-1]
        for name, config in {
            "greedy": allocator(competition="greedy"),
            "cold": allocator(competition="softmax", temperature=0.1),
            "hot": allocator(competition="softmax", temperature=100),
        }.items()
    }
    assert first == {"greedy": (1, 12), "cold": (1, 160), "hot": (1, 12)}


def test_edits_are_capped_and_the_rest_follows_next_time():
    context, state = window(), START
    wanted = {3: 0.5, 20: 0.6, 40: 0.7}
    opened = []
    for _ in range(5):
        plan = allocator(max_edits=1, cooldown=3).plan(context, scores(context, wanted), state)
        context, state = plan.context, plan.state
        opened.append([edit.steps[-1] for edit in plan.edits])
    assert opened == [[(1, 160)], [(1, 80)], [(1, 12)], [], []]


def test_move_budget_bounds_what_one_refocus_moves():
    context = window()
    request = scores(context, {41: 0.5, 3: 0.9})
    assert allocator(move_budget=11).plan(context, request, START).edits == ()
    plan = allocator(move_budget=20).plan(context, request, START)
    assert [edit.cost_change for edit in plan.edits] == [12]
    plan = allocator(move_budget=21).plan(context, request, START)
    assert [edit.cost_change for edit in plan.edits] == [12, 9]


def test_an_expand_is_paid_by_the_least_loss():
    context = window(reveal=(3, 40))
    context = replace(context, budget=context.cost)
    # Block 2 costs 3; blocks 3 and 40 could pay, 40 loses less.
    plan = allocator().plan(context, scores(context, {2: 1.0}, keep={12: 0.6, 160: 0.5}), START)
    assert summary(plan) == [("collapse", "payment", 1, 160), ("expand", "proposal", 1, 8)]
    assert plan.edits[0].score == pytest.approx(0.5)
    assert plan.context.cost == context.cost


@pytest.mark.parametrize(("loss", "swapped"), [(0.5, True), (0.75, False), (0.8, False)])
def test_payment_must_lose_less_than_is_won_less_the_margin(loss, swapped):
    context = window(reveal=(3,))
    context = replace(context, budget=context.cost)
    plan = allocator(swap_margin=0.25).plan(
        context, scores(context, {2: 1.0}, keep={12: loss}), START
    )
    assert bool(plan.edits) == swapped


def test_payment_never_closes_the_group_that_is_opened():
    context = window(cursor=24).expand(0)  # four level-1 gists, then the tail
    context = replace(context, budget=context.cost)
    assert allocator().plan(context, scores(context, {1: 1.0}), START).edits == ()


def test_a_revealed_proposal_does_not_pay_for_a_lesser_one():
    context = window(reveal=(3,))
    context = replace(context, budget=context.cost)
    plan = allocator().plan(context, scores(context, {3: 1.0, 2: 0.9}), START)
    assert plan.edits == ()


def test_payments_count_as_edits_and_prefer_few_large_groups_when_short():
    # Two raw blocks are the worst; the expand needs 6 and one edit is left for payment.
    context = WorkingContext.initial(
        328, block_size=4, gist_cost=2, budget=100, tail_tokens=8
    ).expand(0)
    context = context.open_to(64, 1).reveal(0)
    context = replace(context, budget=context.cost)
    keep = dict.fromkeys(range(64, 128, 4), 0.05)
    tight = allocator(max_edits=2)
    request = scores(context, keep=keep, expand={128: 2.0})
    plan = tight.plan(context, request, START)
    assert [(edit.reason, edit.cost_change) for edit in plan.edits] == [
        ("payment", -6),
        ("utility", 6),
    ]
    assert allocator(max_edits=1).plan(context, request, START).edits == ()


def test_room_is_made_by_the_least_loss_per_freed_token():
    context = window(reveal=(3, 40)).extend(2)
    context = replace(context, budget=context.cost - 2)
    plan = allocator().plan(context, scores(context, keep={12: 0.2, 160: 0.3, 256: 9.0}), START)
    assert summary(plan) == [("collapse", "room", 1, 12)]
    assert plan.state.levels.numel() == 0


def test_room_takes_the_oldest_among_equals():
    context = window(reveal=(3, 40))
    context = replace(context, budget=context.cost - 1)
    plan = allocator().plan(context, FocusScores.unknown(len(context)), START)
    assert summary(plan) == [("collapse", "room", 1, 12)]


def test_room_spares_what_was_just_opened_among_equals():
    config = allocator(cooldown=2)
    context = window(reveal=(40,))
    plan = config.plan(context, scores(context, {3: 1.0}), START)
    context = replace(plan.context, budget=plan.context.cost - 1)
    room = config.make_room(context, FocusScores.unknown(len(context)), plan.state)
    assert summary(room) == [("collapse", "room", 1, 160)]
    assert room.state is plan.state


def test_where_there_is_need_more_room_is_made_than_needed():
    context = window(reveal=(3, 10, 40))
    full = replace(context, budget=context.cost)
    sparing = allocator(spare_share=0.2)  # 7 of 36 token-equivalents
    assert sparing.plan(full, FocusScores.unknown(len(full)), START).edits == ()
    grown = full.extend(1)
    for config, starts in ((allocator(), [12]), (sparing, [12, 40, 160])):
        plan = config.plan(grown, FocusScores.unknown(len(grown)), START)
        assert [(edit.reason, edit.start) for edit in plan.edits] == [("room", s) for s in starts]
    assert full.budget - plan.context.cost >= 7
    # That room lasts for a while.
    later = plan.context.extend(7)
    assert sparing.plan(later, FocusScores.unknown(len(later)), START).edits == ()


def test_nothing_of_worth_collapses_for_room_to_spare():
    context = window(reveal=(3, 10, 40))
    full = replace(context, budget=context.cost).extend(1)
    sparing = allocator(spare_share=0.5)
    plan = sparing.plan(full, scores(full, keep={160: 0.5}), START)
    assert level_of_block(plan.context, 40) == 0
    assert plan.context.free < 18, "all else is as coarse as it can be"
    harmful = sparing.plan(full, scores(full, keep={160: -0.5}), START)
    assert harmful.edits[0].start == 160
    # For need it does, and for no more than that.
    everything = dict.fromkeys(full.starts.tolist(), 0.5)
    plan = sparing.plan(full, scores(full, keep=everything), START)
    assert summary(plan) == [("collapse", "room", 1, 12)]


def test_reserve_and_headroom_are_kept_free():
    context = window(reveal=(3, 40), budget=40)
    assert context.cost == 30
    plan = allocator(headroom=6).plan(context, FocusScores.unknown(len(context)), START, 10)
    assert plan.context.free >= 16
    assert all(edit.reason == "room" for edit in plan.edits)
    same = allocator(headroom=6).plan(context, FocusScores.unknown(len(context)), START, 4)
    assert same.edits == ()


def test_room_making_goes_up_the_tree_without_counting_as_edits():
    context = replace(window(reveal=(0, 21, 42, 63)), budget=9)
    plan = allocator(max_edits=0).plan(context, FocusScores.unknown(len(context)), START)
    assert plan.context.levels.tolist() == [4, 0, 0]
    assert {edit.reason for edit in plan.edits} == {"room"}


def test_a_gist_made_for_room_counts_what_it_stands_for_but_never_less_than_nothing():
    # Both raw blocks must close, then one of the two groups of gists that they complete.
    context = window(cursor=40).expand(0).expand(4).reveal(1).reveal(5)
    context = replace(context, budget=context.cost - 9)
    siblings = dict.fromkeys((0, 8, 12), 0.5) | dict.fromkeys((16, 24, 28), 0.3)
    for keep_1, keep_5, closed in ((-5.0, 0.0, 16), (0.0, 1.0, 0)):
        plan = allocator().plan(
            context, scores(context, keep=siblings | {4: keep_1, 20: keep_5}), START
        )
        assert {edit.start for edit in plan.edits[:2]} == {4, 20}
        assert summary(plan)[2:] == [("collapse", "room", 2, closed)]


def test_a_group_with_a_gist_made_in_this_plan_waits_for_its_score():
    context = window(cursor=24).expand(0).reveal(1)
    context = replace(context, budget=context.cost - 1)
    harmful = dict.fromkeys((0, 8, 12), -1.0)
    plan = allocator().plan(context, scores(context, keep=harmful | {4: 0.1}), START)
    assert summary(plan) == [("collapse", "room", 1, 4)]
    after = plan.context
    later = allocator().plan(after, scores(after, keep=harmful | {4: 0.1}), plan.state)
    assert summary(later) == [("collapse", "threshold", 2, 0)]


def test_a_budget_too_small_for_the_coarsest_window_is_refused():
    context = window(budget=20)
    with pytest.raises(ConfigError, match=r"budget 20 less reserve 8 and headroom 4 leaves 8 .* 9"):
        allocator(headroom=4).plan(context, FocusScores.unknown(len(context)), START, 8)
    with pytest.raises(ConfigError, match="leaves 8"):
        allocator(headroom=4).make_room(context, FocusScores.unknown(len(context)), START, 8)


def test_what_loses_less_than_the_threshold_collapses_without_need():
    context = window(reveal=(3, 40))
    request = scores(context, keep={12: -0.3, 160: -0.1})
    assert summary(allocator().plan(context, request, START)) == [
        ("collapse", "threshold", 1, 12),
        ("collapse", "threshold", 1, 160),
    ]
    assert summary(allocator(collapse_threshold=-0.2).plan(context, request, START)) == [
        ("collapse", "threshold", 1, 12)
    ]
    assert len(allocator(max_edits=1).plan(context, request, START).edits) == 1
    assert len(allocator(move_budget=5).plan(context, request, START).edits) == 1


def test_between_the_thresholds_nothing_moves():
    config = allocator(expand_threshold=0.5, collapse_threshold=0.1)
    closed, opened = window(), window(reveal=(3,))
    everything = dict.fromkeys(opened.starts.tolist(), 1.0)
    assert config.plan(closed, scores(closed, {3: 0.3}), START).edits == ()
    kept = scores(opened, keep=everything | {12: 0.3})
    assert config.plan(opened, kept, START).edits == ()
    dropped = scores(opened, keep=everything | {12: 0.05})
    assert summary(config.plan(opened, dropped, START)) == [("collapse", "threshold", 1, 12)]


def test_a_span_is_not_edited_back_while_it_cools():
    config = allocator(cooldown=2)
    context, state = window(reveal=(2,)), START
    plan = config.plan(context, scores(context, {3: 1.0}), state)
    rounds = []
    for _ in range(4):
        context, state = plan.context, plan.state
        harmful = scores(context, keep={12: -1.0})
        plan = config.plan(context, harmful, state)
        rounds.append(summary(plan))
    assert rounds[:3] == [[], [], [("collapse", "threshold", 1, 12)]]


def test_a_collapsed_span_is_not_opened_again_while_it_cools():
    config = allocator(cooldown=1)
    context = window(reveal=(2, 3))
    plan = config.plan(context, scores(context, keep={12: -1.0}), START)
    assert summary(plan) == [("collapse", "threshold", 1, 12)]
    again = config.plan(plan.context, scores(plan.context, {3: 5.0}), plan.state)
    assert again.edits == ()
    later = config.plan(again.context, scores(again.context, {3: 5.0}), again.state)
    assert summary(later) == [("expand", "proposal", 1, 12)]


def test_the_tail_is_never_touched():
    context = replace(window(cursor=30), budget=60)
    tail = dict.fromkeys(context.starts.tolist(), -5.0)
    plan = allocator().plan(context, scores(context, keep=tail), START)
    assert bool((plan.context.levels[plan.context.ends > 22] == 0).all())


def test_plans_are_reproducible():
    context = window(reveal=(3, 40, 50))
    request = scores(context, {7: 0.4, 9: 0.4, 60: 0.3}, keep={12: -0.5})
    first, second = (allocator().plan(context, request, START) for _ in range(2))
    assert first.edits == second.edits
    assert torch.equal(first.context.spans(), second.context.spans())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"entry_utility": torch.zeros(2)}, r"entry_utility has shape \(2,\), expected \(3,\)"),
        ({"expand_utility": torch.zeros(3, 1)}, r"expand_utility has shape \(3, 1\)"),
        ({"proposal_utility": torch.zeros(1)}, r"proposal_utility has shape \(1,\)"),
        ({"proposal_blocks": torch.empty(0)}, "proposal_blocks has dtype torch.float32"),
        ({"entry_utility": torch.zeros(3, dtype=torch.int64)}, "entry_utility has dtype"),
        ({"entry_utility": torch.tensor([0, float("nan"), 0])}, r"entry_utility\[1\] is nan"),
        (
            {"proposal_blocks": torch.tensor([66]), "proposal_utility": torch.ones(1)},
            "block 66 is proposed, history has 66",
        ),
    ],
)
def test_scores_that_do_not_fit_are_refused(changes, message):
    context = window()
    wrong = replace(FocusScores.unknown(len(context)), **changes)
    with pytest.raises(InputError, match=message):
        allocator().plan(context, wrong, START)


def test_a_negative_reserve_is_refused():
    context = window()
    with pytest.raises(InputError, match="reserve is -1"):
        allocator().plan(context, FocusScores.unknown(len(context)), START, -1)


def test_a_broken_context_is_refused():
    context = window()
    broken = replace(context, starts=context.starts + 1)
    with pytest.raises(InvariantError):
        allocator().plan(broken, FocusScores.unknown(len(context)), START)


@pytest.mark.parametrize(
    "values",
    [
        {"collapse_threshold": 0.05},
        {"temperature": 0},
        {"swap_margin": -0.1},
        {"max_edits": -1},
        {"cooldown": -1},
        {"move_budget": 0},
        {"expand_threshold": float("inf")},
        {"competition": "random"},
        {"spare_share": -0.1},
        {"spare_share": 0.6},
        {"max_edit": 3},
    ],
)
def test_configurations_outside_their_range_are_refused(values):
    with pytest.raises(ConfigError):
        AllocatorConfig.parse(values)
