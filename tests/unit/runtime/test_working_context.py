from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megacontext.errors import ConfigError, InputError, InvariantError
from megacontext.runtime.working_context import WorkingContext


def initial(cursor: int, **changes: int) -> WorkingContext:
    values = {"block_size": 4, "gist_cost": 1, "budget": 64, "tail_tokens": 8} | changes
    return WorkingContext.initial(cursor, **values)


def with_entries(context: WorkingContext, spans: list[tuple[int, int]]) -> WorkingContext:
    levels, starts = torch.tensor(spans, dtype=torch.int64).reshape(-1, 2).unbind(1)
    return replace(context, levels=levels, starts=starts)


def test_initial_has_one_gist_per_digit_and_a_raw_tail():
    context = initial(103)  # the tail starts at 95, in the block of 92 = 1*64 + 1*16 + 3*4
    assert context.spans().tolist() == [
        [3, 0, 64],
        [2, 64, 80],
        [1, 80, 84],
        [1, 84, 88],
        [1, 88, 92],
        [0, 92, 96],
        [0, 96, 100],
        [0, 100, 103],
    ]
    assert context.cost == 5 + 11 == context.coarsest_cost
    assert context.free == 64 - 16
    assert context.costs.tolist() == [1, 1, 1, 1, 1, 4, 4, 3]
    assert context.widths.tolist() == [64, 16, 4, 4, 4, 4, 4, 3]
    assert len(context) == 8


def test_an_empty_history_is_an_empty_window():
    context = initial(0)
    assert len(context) == 0
    assert context.cost == 0
    assert context.spans().shape == (0, 3)
    assert context.legal_collapse.shape == context.legal_expand.shape == (0,)
    assert context.positions("timeline", 10).shape == (0,)
    assert context.extend(5).check().spans().tolist() == [[0, 0, 4], [0, 4, 5]]


def test_a_history_shorter_than_the_tail_is_raw():
    assert initial(7).levels.tolist() == [0, 0]
    assert not initial(7).legal_collapse.any()


def test_depth_is_not_limited():
    context = initial(4**12 + 8, budget=100)
    assert context.top_level == 12
    assert context.spans().tolist()[0] == [12, 0, 4**12]
    assert context.chain_cost(0) == 11 * 3 + 3
    revealed = context.reveal(0).check()
    assert revealed.spans().tolist()[0] == [0, 0, 4]
    assert revealed.levels.tolist()[:5] == [0, 1, 1, 1, 2]


def test_a_gist_costs_its_slots_in_chain_and_window():
    context = initial(64 + 8, gist_cost=3, budget=200)
    assert context.cost == 3 + 8
    assert context.chain_cost(3) == 2 * 3 * 3 + (4 - 3)
    assert context.reveal(3).cost == 11 + 19


def test_chain_cost_of_a_raw_block_is_zero():
    assert initial(103).chain_cost(24) == 0


def test_expand_and_collapse_by_index():
    context = initial(103)
    opened = context.expand(1)
    assert opened.spans().tolist()[1:5] == [[1, 64, 68], [1, 68, 72], [1, 72, 76], [1, 76, 80]]
    assert opened.expand(2).spans().tolist()[1:4] == [[1, 64, 68], [0, 68, 72], [1, 72, 76]]
    assert opened.collapse(3).spans().tolist() == context.spans().tolist()


def test_siblings_collapse_only_all_together():
    context = initial(103).expand(1).expand(2)  # one of four siblings is raw
    for index in (1, 3, 4):
        with pytest.raises(InvariantError, match="siblings are not all here"):
            context.collapse(index)
    assert context.collapse(2).collapse(4).levels.tolist() == initial(103).levels.tolist()


def test_the_tail_cannot_collapse():
    context = initial(103)
    for index in (5, 6, 7):
        assert not context.legal_collapse[index]
        with pytest.raises(InvariantError, match="tail, which starts at 95"):
            context.collapse(index)


def test_a_block_may_collapse_once_the_tail_has_left_it():
    context = initial(103).extend(1)
    assert context.tail_start == 96
    assert context.legal_collapse.tolist() == [False] * 5 + [True, False, False]
    assert context.collapse(5).spans().tolist()[5] == [1, 92, 96]


def test_raw_entries_and_missing_entries_cannot_expand():
    context = initial(103)
    with pytest.raises(InvariantError, match="entry 6 at token 96 is raw"):
        context.expand(6)
    for index in (-1, 8):
        with pytest.raises(InvariantError, match=f"no entry {index}"):
            context.expand(index)
        with pytest.raises(InvariantError, match=f"no entry {index}"):
            context.collapse(index)


def test_extend_fills_the_open_block_first():
    assert initial(103).extend(3).spans().tolist()[7:] == [[0, 100, 104], [0, 104, 106]]
    assert initial(103).extend(0).spans().tolist() == initial(103).spans().tolist()
    with pytest.raises(InputError, match="only grows"):
        initial(103).extend(-1)


def test_extend_beyond_the_budget_is_told_by_check():
    context = initial(103, budget=20).extend(9)
    assert context.free == -5
    context.check(budget=False)
    with pytest.raises(InvariantError, match="cost 25 token-equivalents, over the budget of 20"):
        context.check()


def test_initial_refuses_a_budget_too_small():
    initial(103, budget=16)
    with pytest.raises(ConfigError, match=r"budget 15 is too small: .* costs 16"):
        initial(103, budget=15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 1}, "block_size is 1"),
        ({"gist_cost": 0}, "gist_cost is 0"),
        ({"gist_cost": 4}, "below the block size 4"),
        ({"budget": 0}, "budget is 0"),
        ({"tail_tokens": -1}, "tail_tokens is -1"),
        ({"cursor": -1}, "cursor is -1"),
    ],
)
def test_values_outside_their_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        initial(**({"cursor": 10} | changes))


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([(1, 0), (1, 4), (0, 12), (0, 16)], "entry 2 .* does not start where"),
        ([(1, 0), (1, 4), (1, 4), (0, 8), (0, 12), (0, 16)], "entry 2 .* does not start where"),
        ([(1, 4), (0, 8), (0, 12), (0, 16)], "entry 0 .* does not start where"),
        ([(1, 0), (1, 4), (0, 8), (0, 12)], "entry 3 ends at 16, not at the cursor 18"),
        ([(1, 0), (1, 4), (0, 8), (0, 12), (0, 16), (0, 20)], "entry 5 .* does not start where"),
        ([(1, 0), (1, 4), (0, 8), (0, 12), (1, 16)], "entry 4 .* is a gist past the cursor"),
        ([(1, 0), (1, 4), (1, 8), (0, 12), (0, 16)], "entry 2 .* in the tail, which starts at 10"),
        ([(1, 0), (1, 6), (0, 10), (0, 14)], "entry 1 .* is not aligned"),
        ([(3, 0)], "entry 0 .* has no complete level"),
        ([(-1, 0)], "entry 0 .* has no complete level"),
        ([], r"0 entries cannot tile \[0, 18\)"),
    ],
)
def test_check_names_the_entry_that_breaks_an_invariant(spans, message):
    with pytest.raises(InvariantError, match=message):
        with_entries(initial(18), spans).check()


def test_check_refuses_an_entry_without_tokens():
    with pytest.raises(InvariantError, match=r"entry 2 .* covers no token"):
        with_entries(initial(8), [(0, 0), (0, 4), (0, 8)]).check()


def test_check_refuses_other_dtypes_and_shapes():
    context = initial(8)
    for levels in (context.levels.int(), context.levels[:, None], context.levels[:1]):
        with pytest.raises(InvariantError, match="must be int64 tensors of one shape"):
            replace(context, levels=levels).check()


def test_operations_leave_the_old_context_as_it_was():
    context = initial(103).reveal(17)
    before = context.spans().clone()
    context.collapse_groups(torch.arange(context.sibling_groups.first.numel()))
    context.extend(40).reveal(0)
    assert torch.equal(context.spans(), before)


def test_tokens_outside_the_history_are_refused():
    context = initial(103)
    assert context.index_of(102) == 7
    for token in (-1, 103):
        with pytest.raises(InputError, match=f"token {token} is not in the history"):
            context.index_of(token)
    for block in (-1, 26):
        with pytest.raises(InputError, match="not in the history"):
            context.reveal(block)
        with pytest.raises(InputError, match="not in the history"):
            context.chain_cost(block)
    with pytest.raises(InputError, match="level is -1"):
        context.open_to(0, -1)


def test_packed_positions_count_rows():
    context = initial(103, gist_cost=3)
    assert context.positions("packed", 26).tolist() == [0, 3, 6, 9, 12, 15, 19, 23]
    assert context.positions("packed", 26, rows_per_gist=1).tolist() == [0, 1, 2, 3, 4, 5, 9, 13]
    with pytest.raises(ConfigError, match="takes 26 positions, the model allows 25"):
        context.positions("packed", 25)


def test_gists_come_first_where_told_so():
    context = initial(103, gist_cost=3).reveal(1)
    kinds = ["gist" if level else "raw" for level in context.levels.tolist()]
    assert kinds[:4] == ["gist", "raw", "gist", "gist"], "raw stands among gists"
    rows = [
        3 if kind == "gist" else width
        for kind, width in zip(kinds, context.widths.tolist(), strict=True)
    ]
    expected, at = [0] * len(kinds), 0
    for wanted in ("gist", "raw"):
        for entry, kind in enumerate(kinds):
            if kind == wanted:
                expected[entry], at = at, at + rows[entry]
    assert context.positions("gists_first", at).tolist() == expected
    with pytest.raises(ConfigError, match=f"takes {at} positions, the model allows {at - 1}"):
        context.positions("gists_first", at - 1)


def test_timeline_positions_are_true_where_they_fit():
    context = initial(103)
    assert context.positions("timeline", 103).tolist() == context.starts.tolist()
    # With 40 positions the cursor is at 40 and token 80 at 17; what is older packs from 0.
    assert context.positions("timeline", 40).tolist() == [0, 1, 17, 21, 25, 29, 33, 37]
    with pytest.raises(ConfigError, match="takes 16 positions, the model allows 15"):
        context.positions("timeline", 15)


def test_rows_per_gist_is_at_most_the_cost():
    for rows in (0, 2):
        with pytest.raises(InputError, match=f"rows_per_gist is {rows}"):
            initial(103).positions("packed", 64, rows_per_gist=rows)
