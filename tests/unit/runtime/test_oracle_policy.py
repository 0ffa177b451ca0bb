"""Measured utilities, against the same measurement by hand."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, config, new_engine, words

from megacontext.runtime.oracle_policy import OraclePolicy

SECRET = "the zebra sleeps in the blue barn. "


@pytest.fixture
def engine(base, tmp_path):
    engine = new_engine(tmp_path, base, config=config(budget=256))
    engine.ingest(words(20 * K))
    return engine


def nll(engine, context, pending, future):
    reading = engine.reader.read(context, pending)
    embeddings = torch.cat((reading.embeddings, engine.base.embed(future[:-1])))
    with torch.no_grad():
        logits = engine.base.model(inputs_embeds=embeddings[None]).logits[0]
    return float(torch.nn.functional.cross_entropy(logits[-len(future) :], future, reduction="sum"))


def test_utility_is_the_difference_in_nll(base, engine):
    future, view = base.encode("blue"), engine.focus.view(base.encode("where? "))
    engine.focus.context = context = engine.context.reveal(7).check()
    view = engine.focus.view(base.encode("where? "))
    assert 256 - context.cost > 32 + len(view.pending) + len(future) + K, "no room to make"
    scores = OraclePolicy(future, hints=(3, 7, 2, 999)).score(view).check(context)
    found = dict(
        zip(scores.proposal_blocks.tolist(), scores.proposal_utility.tolist(), strict=True)
    )
    now = nll(engine, context, view.pending, future)
    assert set(found) == {2, 3}
    for block, utility in found.items():
        by_hand = now - nll(engine, context.reveal(block), view.pending, future)
        assert utility == pytest.approx(by_hand, abs=1e-4)
        assert abs(by_hand) > 1e-3, "too flat to tell"
    entry = context.index_of(7 * K)
    without = nll(engine, context.collapse(entry), view.pending, future) - now
    assert float(scores.entry_utility[entry]) == pytest.approx(max(0.0, without), abs=1e-4)
    others = torch.arange(len(context)) != entry
    assert not scores.entry_utility[others].any()


def test_room_is_made_before_it_measures(base, tmp_path):
    """The block at stake stays raw, whatever else has to go."""
    engine = new_engine(tmp_path, base, config=config(budget=160))
    engine.ingest(words(20 * K))
    future, pending = base.encode("blue"), base.encode("where? ")
    scores = OraclePolicy(future, hints=range(20)).score(engine.focus.view(pending))
    scores.check(engine.context)
    assert len(scores.proposal_blocks) > 5
    assert bool(scores.proposal_utility.isfinite().all())


def test_bm25_adds_candidates(base, tmp_path):
    engine = new_engine(tmp_path, base)
    engine.ingest(words(5 * K) + SECRET + words(15 * K, seed=1))
    view = engine.focus.view(base.encode("zebra"))
    scores = OraclePolicy(base.encode("barn")).score(view)
    assert {5} <= set(scores.proposal_blocks.tolist()) <= {4, 5, 6, 7}
    nothing = OraclePolicy(base.encode("barn")).score(engine.focus.view(base.encode("?")))
    assert not len(nothing.proposal_blocks)


def test_it_beats_chance_on_its_own_measure(base, engine):
    """Following the oracle lowers the NLL it measured, by what it said."""
    future, pending = base.encode("barn"), base.encode("where? ")
    engine.focus.policy = OraclePolicy(future, hints=range(15))
    before = nll(engine, engine.context, pending, future)
    plan = engine.focus.refocus(pending, reserve=len(pending))
    expands = [edit for edit in plan.edits if edit.kind == "expand"]
    if len(expands) == len(plan.edits) == 1:
        gained = before - nll(engine, engine.context, pending, future)
        assert gained == pytest.approx(expands[0].score, abs=1e-3)
    assert expands
    assert all(edit.score > 0 for edit in expands)
