"""KV ``incremental`` over any sequence of edits, against a slow plain reference."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from engine_cases import config, learned_gistnet, new_engine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from incremental_cases import SlowReading, held
from tiny_models import tiny_base_model

from megacontext.runtime.reading import ExactReading, IncrementalReading

K = 4
TOLERANCE = 2e-3
BASES = {name: tiny_base_model(name) for name in ("qwen3", "gemma3")}

ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("reveal"), st.integers(0, 30)),
        st.tuples(st.just("collapse"), st.integers(0, 30)),
        st.tuples(st.just("say"), st.integers(1, 5)),
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("remember"), st.just(0)),
    ),
    min_size=1,
    max_size=5,
)


def engine_over(base, reader, slots, positions, folder):
    net = learned_gistnet(base, reader=reader, slots=slots, block_size=K, context_tokens=8)
    own = config(budget=64, tail_tokens=6, query_tokens=5, positions=positions)
    engine = new_engine(folder, base, gistnet=net, config=own)
    tokens = torch.randint(0, 256, (75,), generator=torch.Generator().manual_seed(3))
    engine.ingestor.append(tokens)
    engine.focus.advance(75)
    return engine


def edited(context, action, where):
    """The context after an edit, or itself where that edit is not possible."""
    if action == "reveal":
        new = context.reveal(where % (context.cursor // K))
        return new if new.cost <= context.budget else context
    legal = context.legal_collapse.nonzero().flatten().tolist()
    return context.collapse(legal[where % len(legal)]) if legal else context


def compare(engine, reading, slow, window, pending, logits, slow_logits):
    assert reading.computed == slow.computed
    layout = engine.reader.layout(window, len(pending), ahead=K)
    found = held(reading, layout, engine.reader)
    assert found.keys() == slow.known.keys()
    for name, (position, keys, values) in found.items():
        assert position == slow.places[name]
        assert (keys - slow.known[name][0]).abs().max() < TOLERANCE, name
        assert (values - slow.known[name][1]).abs().max() < TOLERANCE, name
    assert (logits - slow_logits).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    ("base", "reader", "slots", "positions"),
    [
        ("qwen3", "kv", 2, "packed"),
        ("qwen3", "embedding", 1, "gists_first"),
        ("qwen3", "embedding", 1, "timeline"),
        ("gemma3", "kv", 1, "timeline"),
    ],
)
@given(actions=ACTIONS, halo=st.integers(0, 6), seed=st.integers(0, 99))
@settings(
    max_examples=6,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_it_holds_what_the_reference_holds(base, reader, slots, positions, actions, halo, seed):
    base = BASES[base]
    draw = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_over(base, reader, slots, positions, Path(folder))
        reading = IncrementalReading(base, engine.reader, halo=halo, query_tokens=5)
        slow = SlowReading(engine, halo=halo)
        said = torch.empty(0, dtype=torch.int64)
        asked = 0
        for action, number in [("read", 0), *actions]:
            if action in ("say", "step"):
                new = torch.randint(0, 256, (number,), generator=draw)
                said, asked = torch.cat((said, new)), asked + number
            if action == "step":
                for token in new.split(1):
                    logits, expected = reading.step(token), slow.step(token)
                    assert (logits - expected).abs().max() < TOLERANCE
                continue
            if action == "remember":
                engine.ingestor.append(said)
                engine.focus.advance(engine.memory.n_tokens)
                said = said[:0]
            if action in ("reveal", "collapse"):
                engine.focus.context = edited(engine.context, action, number).check()
            window = engine.context
            logits = reading.read(window, said, asking=asked)
            expected = slow.read(window, said, asking=asked)
            compare(engine, reading, slow, window, said, logits, expected)
        engine.memory.close()


@given(
    actions=st.lists(
        st.tuples(st.sampled_from(["say", "step", "remember", "read"]), st.integers(1, 4)),
        max_size=5,
    ),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_without_edits_it_equals_exact(actions, seed):
    base = BASES["gemma3"]
    draw = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        engine = engine_over(base, "kv", 2, "packed", Path(folder))
        modes = [ExactReading(base, engine.reader), IncrementalReading(base, engine.reader)]
        said = torch.empty(0, dtype=torch.int64)
        for action, number in [("read", 0), *actions, ("read", 0)]:
            if action in ("say", "step"):
                new = torch.randint(0, 256, (number,), generator=draw)
                said = torch.cat((said, new))
            if action == "step":
                for token in new.split(1):
                    exact, incremental = (mode.step(token) for mode in modes)
                    assert (exact - incremental).abs().max() < TOLERANCE
                continue
            if action == "remember":
                engine.ingestor.append(said)
                # The budget has room for all: nothing needs to collapse.
                engine.focus.advance(engine.memory.n_tokens)
                said = said[:0]
            exact, incremental = (mode.read(engine.context, said) for mode in modes)
            assert (exact - incremental).abs().max() < TOLERANCE
        engine.memory.close()
