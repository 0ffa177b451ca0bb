"""Focus by BM25 and query likelihood, beside its definition."""

from __future__ import annotations

import math

import pytest
import torch
from engine_cases import K, new_engine, words

from megacontext.runtime.focus_policies import LexicalPolicy
from megacontext.runtime.likelihood_policy import LikelihoodPolicy
from megacontext.runtime.query_likelihood import QueryLikelihood

SECRET = "the zebra sleeps in the blue barn. "
QUESTION = "where does the zebra sleep"


@pytest.fixture
def engine(base, tmp_path):
    engine = new_engine(tmp_path, base)
    text = words(12 * K) + SECRET + words(9 * K, seed=1) + SECRET + words(9 * K, seed=2)
    engine.ingest(text)
    return engine


def policy(**changes):
    values = {"least_nats": -100.0, "relative_floor": 0.0, "neighbour_share": (0.0, 0.0)}
    return LikelihoodPolicy(**(values | changes))


def asked(base, engine):
    return engine.focus.view(base.encode(QUESTION), query=base.encode(QUESTION))


def found(scores):
    pairs = zip(scores.proposal_blocks.tolist(), scores.proposal_utility.tolist(), strict=True)
    return {block: worth for block, worth in pairs if worth}


def test_worth_is_nats_less_what_a_likelier_block_leaves(base, engine):
    view = asked(base, engine)
    blocks, _ = LexicalPolicy(proposals=5, relative_floor=0.0).search(view)
    gains = QueryLikelihood().gains(view, blocks[:5]).tolist()
    scores = policy(proposals=5).score(view).check(view.context)
    expected = {
        block: gain * math.exp((gain - max(gains)) / 4)
        for block, gain in zip(blocks[:5].tolist(), gains, strict=True)
        if gain > 0
    }
    positive = {block: worth for block, worth in found(scores).items() if worth > 0}
    assert positive == pytest.approx(expected, rel=1e-4)
    assert expected, "some block helps even a random model"


def test_what_helps_little_is_left_out(base, engine):
    view = asked(base, engine)
    every = found(policy().score(view))
    least = sorted(every.values())[len(every) // 2]
    gains = QueryLikelihood().gains(view, torch.tensor(list(every)))
    kept = found(policy(least_nats=float(gains.median())).score(view))
    assert set(kept) < set(every)
    best = max(every.values())
    assert set(found(policy(relative_floor=least / best).score(view))) == {
        block for block, worth in every.items() if worth >= least
    }


def test_where_nobody_asks_it_is_bm25(base, engine):
    view = engine.focus.view(base.encode(QUESTION))
    theirs = LexicalPolicy().score(view)
    ours = LikelihoodPolicy().score(view)
    assert torch.equal(ours.proposal_blocks, theirs.proposal_blocks)
    assert torch.equal(ours.proposal_utility, theirs.proposal_utility)


def test_without_any_word_in_common_it_asks_for_nothing(base, engine):
    query = base.encode("qqqq xxxx")
    scores = LikelihoodPolicy().score(engine.focus.view(query, query=query))
    assert not len(scores.proposal_blocks)
    assert not scores.entry_utility.any()


def test_through_the_engine(base, tmp_path):
    engine = new_engine(tmp_path, base, policy=policy(relative_floor=0.5))
    engine.ingest(words(12 * K) + SECRET + words(20 * K, seed=1))
    engine.ask(QUESTION, query=QUESTION, max_new_tokens=3, look_again="e")
    assert any(record.edits for record in engine.focus.records)
    engine.context.check()
