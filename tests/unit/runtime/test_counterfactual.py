"""What changes of a context are worth, against contexts made by hand and read token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_cases import K, config, learned_gistnet, new_engine, words
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import tiny_base_model

from megacontext.runtime.counterfactual import Counterfactual

HEADROOM = 32
PENDING, FUTURE = "where? ", "blue barn"


@pytest.fixture(scope="module")
def base():
    return tiny_base_model(max_positions=512)


@pytest.fixture(scope="module", params=["mean", "kv"])
def engine(request, base, tmp_path_factory):
    """45 blocks, the first 32 of them one gist of level 2; there is room for much more."""
    net = learned_gistnet(base, slots=2) if request.param == "kv" else None
    folder = tmp_path_factory.mktemp("memory")
    engine = new_engine(folder, base, gistnet=net, config=config(budget=512))
    engine.ingest(words(45 * K + 5))
    assert engine.context.levels[:2].tolist() == [2, 1]
    return engine


@torch.no_grad()
def nll(engine, context, pending, future):
    """The base reads the context and then one token after the other."""
    base, reading = engine.base, engine.reader.read(context, pending)
    read = base.prefill(reading, keep=1)
    logits, lost = read.logits[-1], 0.0
    for token in future:
        lost -= float(torch.log_softmax(logits.float(), dim=-1)[token])
        position = read.cache.positions[-1:] + 1
        logits = base.step(token[None], position, read.cache)[-1]
    return lost


def fitted(context, room, kept=None):
    """Collapses the oldest groups, but none that holds token ``kept``, until ``room`` is free."""
    while context.budget - context.cost < room:
        spans = context.spans().tolist()
        oldest = next(
            index
            for index in context.legal_collapse.nonzero().flatten().tolist()
            if kept is None or not spans[index][1] <= kept < spans[index][2]
        )
        context = context.collapse(oldest)
    return context


def block_worth(engine, context, block, pending, future):
    """In nats, by the definition."""
    room = len(pending) + len(future) + HEADROOM

    def lost(changed, kept=None):
        return nll(engine, fitted(changed, room, kept), pending, future)

    entry = context.index_of(block * K)
    if int(context.levels[entry]) > 0:
        return lost(context) - lost(context.reveal(block), block * K)
    if bool(context.legal_collapse[entry]):
        return lost(context.collapse(entry)) - lost(context)
    return 0.0


def measure_of(engine, context, **options):
    pending, future = engine.base.encode(PENDING), engine.base.encode(FUTURE)
    view = replace(engine.focus.view(pending), context=context)
    return Counterfactual(view, future, **options)


def measured(engine, context, blocks, **options):
    blocks = torch.tensor(blocks, dtype=torch.int64)
    return measure_of(engine, context, **options).blocks(blocks).tolist()


def test_worth_of_blocks_at_every_depth(engine):
    context = engine.context.reveal(34).reveal(36)
    pending, future = engine.base.encode(PENDING), engine.base.encode(FUTURE)
    # Deep under the old gist, a gist of its own, raw ones, and the tail, which stays as it is.
    blocks = [36, 3, 33, 44, 31, 34, 45]
    found = measured(engine, context, blocks)
    for block, worth in zip(blocks, found, strict=True):
        by_hand = block_worth(engine, context, block, pending, future)
        assert worth == pytest.approx(by_hand, abs=2e-4), block
    assert found[3] == found[6] == 0.0
    assert all(abs(found[i]) > 1e-3 for i in (0, 1, 2, 4, 5)), "too flat to tell"


raised = st.lists(st.integers(0, 42), max_size=4)


@settings(max_examples=8)
@given(raised, st.lists(st.integers(0, 45), min_size=1, max_size=4))
def test_worth_of_blocks_of_any_context(engine, opened, blocks):
    context = engine.context
    pending, future = engine.base.encode(PENDING), engine.base.encode(FUTURE)
    for block in opened:
        context = context.reveal(block)
    assume(context.free >= len(pending) + len(future) + HEADROOM)
    found = measured(engine, context, blocks)
    for block, worth in zip(blocks, found, strict=True):
        by_hand = block_worth(engine, context, block, pending, future)
        assert worth == pytest.approx(by_hand, abs=2e-4)


def test_entries_are_signed_as_lens_scores_are(engine):
    before = engine.context
    context = before.reveal(34)
    pending, future = engine.base.encode(PENDING), engine.base.encode(FUTURE)
    measure = measure_of(engine, context)
    raw = context.index_of(34 * K)
    indices = [raw, 0, 1, len(context) - 4]
    assert [int(context.levels[i]) for i in indices] == [0, 2, 1, 1]
    now = nll(engine, context, pending, future)
    assert float(measure.now) == pytest.approx(now, abs=2e-4)
    # Raw detail that a collapse would improve on does harm: its score is negative.
    expected = [nll(engine, context.collapse(raw), pending, future) - now]
    expected += [now - nll(engine, context.expand(i), pending, future) for i in indices[1:]]
    found = measure.entries(torch.tensor(indices))
    assert found.tolist() == pytest.approx(expected, abs=2e-4)
    assert (found.abs() > 1e-3).all()
    assert engine.context is before, "nothing was changed"


@pytest.mark.parametrize("budget", [160, 176, 200])
def test_every_context_tried_fits_into_the_budget(base, budget, tmp_path):
    """As in a session: the oldest detail makes room, what is tried stays."""
    engine = new_engine(tmp_path, base, config=config(budget=budget))
    engine.ingest(words(20 * K))
    pending, future = base.encode(PENDING), base.encode(FUTURE)
    context = engine.context
    while context.free >= K:
        context = context.reveal(int((context.levels == 1).nonzero()[-1]))
    assert context.free < len(pending) + len(future) + HEADROOM
    raw = int((context.levels == 0).nonzero()[0])
    blocks = [0, 7, raw]
    found = measured(engine, context, blocks)
    for block, worth in zip(blocks, found, strict=True):
        by_hand = block_worth(engine, context, block, pending, future)
        assert worth == pytest.approx(by_hand, abs=2e-4), block
    assert any(abs(worth) > 1e-3 for worth in found)


def test_how_many_are_read_at_once_does_not_matter(engine):
    context = engine.context.reveal(35)
    blocks = [0, 5, 33, 35, 40]
    one, three, all_ = (measured(engine, context, blocks, batch=n) for n in (1, 3, 16))
    assert one == pytest.approx(three, abs=2e-4)
    assert one == pytest.approx(all_, abs=2e-4)
    again = measured(engine, context, blocks[::-1], batch=3)
    assert again == pytest.approx(three[::-1], abs=2e-4)


def test_nothing_to_try(engine):
    assert measured(engine, engine.context, []) == []
    nothing = torch.empty(0, dtype=torch.int64)
    assert measure_of(engine, engine.context).entries(nothing).tolist() == []


def test_without_pending_tokens_history_itself_predicts(engine):
    future = engine.base.encode("amber birch")
    nothing = torch.empty(0, dtype=torch.int64)
    measure = Counterfactual(engine.focus.view(nothing), future)
    context = engine.context
    expected = nll(engine, context, nothing, future)
    assert float(measure.now) == pytest.approx(expected, abs=2e-4)
    gain = expected - nll(engine, context.reveal(3), nothing, future)
    assert measure.blocks(torch.tensor([3])).tolist() == pytest.approx([gain], abs=2e-4)
