"""Costs of the hot path, each beside what it is compared with, in one run.

Run with ``./bootstrap pytest benchmarks --benchmark-enable --benchmark-json=out.json``; the groups'
relative times are the ratios that matter, since machines differ.
"""

from __future__ import annotations

import random

import pytest
import torch

from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.engine import Engine

WINDOW = 1024
HISTORY_CHARACTERS = 120_000


@pytest.fixture(scope="module")
def base():
    return BaseModel.from_pretrained("bundled:tiny")


@pytest.fixture(scope="module")
def engine(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "speed.mctx"
    with Memory.create(path, Engine.identity(base)) as memory:
        engine = Engine(base, memory)
        engine.ingest(read_book(DemoConfig(max_characters=HISTORY_CHARACTERS)))
        yield engine


def raw_window(base, engine):
    ids = engine.memory.tokens(engine.memory.n_tokens - WINDOW, engine.memory.n_tokens).long()
    return ContextInput(base.embed(ids), torch.arange(WINDOW))


@pytest.mark.benchmark(group="a refocus and one decode step")
def test_decode_step(benchmark, base, engine):
    read = base.prefill(raw_window(base, engine), keep=1)
    position = torch.tensor([WINDOW])
    benchmark(lambda: base.step(torch.tensor([5]), position, read.cache))


@pytest.mark.benchmark(group="a refocus and one decode step")
def test_refocus(benchmark, engine):
    words = [
        "king",
        "queen",
        "castle",
        "forest",
        "golden",
        "apple",
        "horse",
        "ring",
        "sword",
        "giant",
        "witch",
        "river",
    ]
    rng = random.Random(0)
    benchmark(lambda: engine.refocus(" ".join(rng.sample(words, 4)), reserve=64))


@pytest.mark.benchmark(group="32 decoded tokens")
def test_plain_window_decodes_32_tokens(benchmark, base, engine):
    window = raw_window(base, engine)

    def decode():
        read = base.prefill(ContextInput(window.embeddings[-8:], torch.arange(8)), keep=1)
        for step in range(32):
            base.step(torch.tensor([5]), torch.tensor([8 + step]), read.cache)

    benchmark(decode)


@pytest.mark.benchmark(group="32 decoded tokens")
def test_engine_decodes_32_tokens_with_a_refocus(benchmark, engine):
    benchmark(lambda: list(engine.generate("The king", max_new_tokens=32, remember=False)))


@pytest.mark.benchmark(group="taking in 8,192 tokens")
def test_base_reads(benchmark, base, engine):
    window = raw_window(base, engine)

    def read():
        for _ in range(8):
            base.prefill(window, keep=1)

    benchmark.pedantic(read, rounds=3)


@pytest.mark.benchmark(group="taking in 8,192 tokens")
def test_memory_ingests(benchmark, base, engine, tmp_path):
    ids = engine.memory.tokens(0, 8192).long()
    with Memory.create(tmp_path / "fresh.mctx", Engine.identity(base)) as memory:
        fresh = Engine(base, memory)
        benchmark.pedantic(lambda: fresh.ingestor.append(ids), rounds=3)
