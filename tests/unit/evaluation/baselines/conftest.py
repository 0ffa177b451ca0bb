"""Rivals over short histories of random tiny models."""

from __future__ import annotations

import pytest
from engine_cases import config, words
from tiny_models import tiny_base_model

from megacontext.evaluation.baselines import RivalsConfig
from megacontext.memory import Memory
from megacontext.runtime.engine import Engine


# Keys that rotate in part and come from one matrix with queries and values; and a plain model.
@pytest.fixture(scope="session", params=["qwen3", "gpt-neox"])
def base(request):
    return tiny_base_model(request.param, max_positions=256)


@pytest.fixture
def habits():
    """Budget 192, a tail of one block of 32 tokens."""
    # Exact, since tests watch what the base reads at once.
    return RivalsConfig(engine=config(kv="exact"))


@pytest.fixture
def remember(tmp_path):
    """Makes a memory of a text: ``remember(base, text)``."""
    opened: list[Memory] = []

    def make(base, text=None, gistnet=None):
        path = tmp_path / f"{len(opened)}.mctx"
        memory = Memory.create(path, Engine.identity(base, gistnet))
        opened.append(memory)
        Engine(base, memory, gistnet=gistnet, config=config()).ingest(text or words(900))
        return memory

    yield make
    for memory in opened:
        memory.close()
