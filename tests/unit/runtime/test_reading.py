"""What is computed anew in each KV mode, and what a mode needs of the base model."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, config, learned_gistnet, new_engine, words
from tiny_models import tiny_base_model

from megacontext.errors import ConfigError
from megacontext.runtime.reading import (
    ExactReading,
    IncrementalReading,
    kv_mode,
    new_reading,
    require_rotation,
)

NOTHING = torch.empty(0, dtype=torch.int64)


@pytest.fixture
def engine(tmp_path):
    base = tiny_base_model(max_positions=256)
    own = config(budget=250, tail_tokens=8, kv="incremental")
    engine = new_engine(tmp_path, base, gistnet=learned_gistnet(base, slots=2), config=own)
    engine.ingest(words(K * K + 3 * K + 7))
    engine.focus.context = engine.context.reveal(K + 1)
    return engine


def read(engine, pending=NOTHING, **options):
    reading = IncrementalReading(engine.base, engine.reader, **options)
    reading.read(engine.context, pending)
    return reading


def test_the_first_reading_computes_all_rows(engine):
    reading = read(engine)
    raw = engine.context.levels == 0
    assert reading.computed == reading.cache.n_rows == int(engine.context.widths[raw].sum())


def test_reading_the_same_again_computes_the_newest_row(engine):
    reading = read(engine, torch.tensor([5, 6, 7]))
    reading.read(engine.context, torch.tensor([5, 6, 7]), asking=3)
    assert reading.computed == 1


def test_tokens_that_were_stepped_over_are_known(engine):
    reading = read(engine)
    for token in (5, 6, 7):
        reading.step(torch.tensor([token]))
    reading.read(engine.context, torch.tensor([5, 6, 7]), asking=3)
    assert reading.computed == 1


@pytest.mark.parametrize(
    ("pending", "asking", "halo", "computed"),
    # A block is inserted; behind it stands a raw block of 32, then a tail of 39 tokens.
    [
        (0, 0, 0, K + 1),
        (5, 3, 0, K + 5),
        (0, 9, 0, K + 9),
        (0, 99, 0, K + 16),
        (0, 0, 7, K + 7 + 1),
    ],
)
def test_an_inserted_block_is_computed_with_what_asks(engine, pending, asking, halo, computed):
    tokens = torch.arange(pending)
    reading = read(engine, tokens, halo=halo, query_tokens=16)
    before = reading.cache.n_rows
    window = engine.context.reveal(K)
    reading.read(window, tokens, asking=asking)
    assert reading.computed == computed
    assert reading.cache.n_rows == before + K
    assert reading.cache.n_gists == 2 * int((window.levels > 0).sum())


def test_a_collapsed_block_costs_no_row(engine):
    reading = read(engine)
    before = reading.cache.n_rows
    window = engine.context
    index = int((window.legal_collapse & (window.levels == 0)).nonzero()[0])
    reading.read(window.collapse(index), NOTHING)
    assert reading.computed == 1
    assert reading.cache.n_rows == before - K


def test_a_collapse_brings_nothing_that_what_asks_has_not_seen(engine):
    reading = read(engine, query_tokens=16)
    window = engine.context
    index = int((window.legal_collapse & (window.levels == 0)).nonzero()[0])
    reading.read(window.collapse(index), NOTHING, asking=9)
    assert reading.computed == 1


@pytest.mark.parametrize("remembered", [False, True])
def test_exact_keeps_tokens_that_were_stepped_over(engine, monkeypatch, remembered):
    said = torch.tensor([5, 6, 7, 8])
    stepping, anew = (ExactReading(engine.base, engine.reader) for _ in range(2))
    stepping.read(engine.context, said[:1])
    for token in said[1:].split(1):
        stepping.step(token)
    if remembered:
        engine.ingestor.append(said)
        engine.focus.advance(engine.memory.n_tokens)
        said = NOTHING
    computed = []
    forward = type(engine.base).forward_rows

    def watched(self, embeddings, *rest):
        computed.append(embeddings.shape[1])
        return forward(self, embeddings, *rest)

    monkeypatch.setattr(type(engine.base), "forward_rows", watched)
    logits = stepping.read(engine.context, said)
    assert computed == [1]
    assert (logits - anew.read(engine.context, said)).abs().max() < 1e-4
    assert torch.equal(stepping.cache.positions, anew.cache.positions)
    # Behind an edit they are computed again, and no older token counts as stepped over.
    window = engine.context.reveal(K)
    assert (stepping.read(window, said) - anew.read(window, said)).abs().max() < 1e-4
    assert computed[-2:] == computed[-1:] * 2


def test_telemetry_counts_what_is_inserted(engine):
    cached = engine.context
    engine.focus.context = cached.reveal(K)
    assert engine.focus._recomputed(cached, torch.arange(3)) == K + 3
    assert engine.focus._recomputed(None, NOTHING) == 3 * K + 7
    assert engine.focus._recomputed(engine.context, torch.arange(3)) == 1
    engine.focus.kv = "exact"
    assert engine.focus._recomputed(cached, torch.arange(3)) == 3 * K + 7 + 3


def test_modes(engine):
    for mode, kind in (("exact", ExactReading), ("incremental", IncrementalReading)):
        reading = new_reading(mode, engine.base, engine.reader, halo=0, query_tokens=8)
        assert type(reading) is kind
        assert reading.window is None
    assert isinstance(engine.new_reading(), IncrementalReading)


def test_absolute_positions_are_refused():
    with pytest.raises(ConfigError, match="keys of tiny-gpt2 cannot be moved"):
        require_rotation(tiny_base_model("gpt2"))
    require_rotation(tiny_base_model("llama"))


def test_auto_is_incremental_where_the_keys_can_be_moved(tmp_path):
    for architecture, mode in (("llama", "incremental"), ("gpt2", "exact")):
        base = tiny_base_model(architecture, max_positions=256)
        assert kv_mode("auto", base) == mode
        assert kv_mode("exact", base) == "exact"
        own = config()
        assert own.kv == "auto"
        engine = new_engine(tmp_path, base, config=own, name=architecture)
        assert engine.state().kv == engine.focus.kv == mode
        kind = IncrementalReading if mode == "incremental" else ExactReading
        assert isinstance(engine.new_reading(), kind)
    with pytest.raises(ConfigError, match="set kv to 'exact'"):
        kv_mode("incremental", tiny_base_model("gpt2"))


def test_no_other_mode():
    with pytest.raises(ConfigError, match="kv"):
        config(kv="fast")
