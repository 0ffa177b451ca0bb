"""Several sequences in one forward, against each of them by itself."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from tiny_models import tiny_base_model
from transformers.models.llama import LlamaConfig

from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.batch_cache import BatchCache, turns_by_length
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.kv_cache import crop, layer_entries

TOLERANCE = 1e-4
NAMES = ("qwen3", "mixtral-sliding", "gemma2", "gpt-neox", "gpt2")


def context(base, positions, gist_positions=(), seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = base.embed(torch.randint(0, 256, (len(positions),), generator=random))
    at = torch.tensor(positions)
    if not gist_positions:
        return ContextInput(rows, at)
    shape = (base.n_layers, len(gist_positions), base.n_kv_heads)
    keys = torch.randn(*shape, base.head_dim, generator=random)
    values = torch.randn(*shape, base.value_dim, generator=random)
    return ContextInput(rows, at, keys, values, torch.tensor(gist_positions))


def read(base, *arguments):
    return base.prefill(context(base, *arguments), keep=1).cache


def caches(base):
    """Three lengths; positions with gaps; gists where the base takes them."""
    gists = () if base.name == "tiny-gpt2" else (0, 1, 7)
    return [
        read(base, [2, 3, 4, 5, 6, 9, 12, 13], gists, 1),
        read(base, [0, 1, 2], (), 2),
        read(base, list(range(20)), (), 3),
    ]


def step_alone(base, cache, token):
    return base.step(torch.tensor([token]), cache.positions[-1:] + 1, cache)[-1]


@pytest.mark.parametrize("name", NAMES)
def test_each_row_reads_as_it_would_alone(name):
    base = tiny_base_model(name)
    alone = caches(base)
    batch = BatchCache(base, [crop(cache, cache.n_rows) for cache in alone], 5)
    heard = [[], [], []]
    for rows in ([0, 1, 2], [0, 2], [2], [0, 1, 2], [1]):
        tokens = {row: 40 + 3 * row + len(heard[row]) for row in rows}
        logits = batch.step(tokens)
        for row, token in tokens.items():
            heard[row].append(token)
            assert (logits[row] - step_alone(base, alone[row], token)).abs().max() < TOLERANCE
    assert not batch.has_room([])
    for row, cache in enumerate(alone):
        tokens, grown = batch.grown(row)
        assert tokens.tolist() == heard[row]
        assert torch.equal(grown.positions, cache.positions)
        assert torch.equal(grown.gist_positions, cache.gist_positions)
        pairs = zip(layer_entries(grown.entries), layer_entries(cache.entries), strict=True)
        for (keys, values), (own_keys, own_values) in pairs:
            assert (keys - own_keys).abs().max() < TOLERANCE
            assert (values - own_values).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_a_row_can_be_placed_anew(name):
    """A shorter and a longer cache than before; the other rows do not notice."""
    base = tiny_base_model(name)
    alone = caches(base)
    batch = BatchCache(base, [crop(cache, cache.n_rows) for cache in alone], 12)
    for row, length in ((2, 4), (1, 27)):
        batch.step({0: 7, 1: 8, 2: 9})
        for cache, token in zip(alone, (7, 8, 9), strict=True):
            step_alone(base, cache, token)
        new = read(base, list(range(length)), (), 5)
        assert batch.has_room([new])
        batch.place(row, crop(new, length))
        alone[row] = new
        assert batch.grown(row)[0].tolist() == []
        assert len(batch.grown(row)[1]) == length
    logits = batch.step({0: 5, 1: 5, 2: 5})
    for row, cache in enumerate(alone):
        assert (logits[row] - step_alone(base, cache, 5)).abs().max() < TOLERANCE


def test_room():
    base = tiny_base_model()
    batch = BatchCache(base, caches(base), 2)
    assert batch.has_room([read(base, list(range(21)))])
    assert not batch.has_room([read(base, list(range(22)))])
    batch.step({1: 3})
    assert batch.has_room([])
    batch.step({1: 3})
    assert not batch.has_room([])


def test_a_failed_forward_leaves_the_rows_as_they_were(monkeypatch):
    base = tiny_base_model()
    batch, other = (BatchCache(base, caches(base), 4) for _ in range(2))
    forward = BaseModel.forward_rows

    def failing(self, *arguments):
        forward(self, *arguments)
        raise RuntimeError("no room on the device")

    monkeypatch.setattr(BaseModel, "forward_rows", failing)
    with pytest.raises(RuntimeError, match="no room"):
        batch.step({0: 1, 1: 2})
    monkeypatch.undo()
    tokens = {0: 7, 1: 8, 2: 9}
    assert torch.equal(batch.step(tokens), other.step(tokens))
    assert batch.grown(0)[0].tolist() == [7]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_longest_sequence(kind, monkeypatch):
    own = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    scaled = {
        "rope_type": kind,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    } | own
    monkeypatch.setitem(
        tiny_models.CONFIGS, kind, (LlamaConfig, {"head_dim": 8, "rope_parameters": scaled})
    )
    assert turns_by_length(tiny_base_model(kind))


@pytest.mark.parametrize("name", [*NAMES, "llama-yarn", "gemma3"])
def test_frequencies_that_do_not(name):
    assert not turns_by_length(tiny_base_model(name))
