from __future__ import annotations

import pytest

from megacontext.runtime.focus_metrics import FocusMeter
from megacontext.runtime.focus_scores import AllocatorState, Edit, FocusPlan
from megacontext.runtime.working_context import WorkingContext


def plan(context: WorkingContext, n_edits: int) -> FocusPlan:
    edit = Edit("expand", 1, 0, 4, 1.0, 3, "proposal", ((1, 0),))
    return FocusPlan((edit,) * n_edits, context, AllocatorState.initial())


def test_nothing_observed_is_zero():
    meter = FocusMeter()
    assert (meter.swap_rate, meter.residency, meter.utilization) == (0, 0, 0)


def test_rates_over_three_rounds():
    closed = WorkingContext.initial(24, block_size=4, gist_cost=1, budget=20, tail_tokens=8)
    opened = closed.expand(0)
    assert (len(closed), len(opened)) == (3, 6)
    meter = FocusMeter()
    meter.observe(closed, plan(closed, 0))
    meter.observe(closed, plan(opened, 1))
    meter.observe(opened, plan(opened, 2))
    assert meter.swap_rate == pytest.approx((0 + 1 / 3 + 2 / 6) / 3)
    # The tail's two blocks stay three rounds, the gist one, its four children two.
    assert meter.residency == pytest.approx((2 * 3 + 1 + 4 * 2) / 7)
    assert meter.utilization == pytest.approx((9 + 12 + 12) / 20 / 3)


def test_a_span_that_comes_back_begins_a_new_stay():
    closed = WorkingContext.initial(24, block_size=4, gist_cost=1, budget=20, tail_tokens=8)
    opened = closed.expand(0)
    meter = FocusMeter()
    for context in (closed, opened, closed):
        meter.observe(context, plan(context, 0))
    assert meter.residency == pytest.approx((3 + 6 + 3) / (2 + 1 + 4 + 1))
