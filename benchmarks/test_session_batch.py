"""Decoding of several sessions together, beside the same sessions one after the other.

Run with ``./bootstrap pytest benchmarks/test_session_batch.py --benchmark-enable``. Each group is
one number of sessions; the ratio of its two rows says how many times the tokens a second a batch
gives.
"""

from __future__ import annotations

from itertools import cycle

import pytest

from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine
from megacontext.runtime.session_batch import SessionBatch

HISTORY_CHARACTERS = 60_000
TOKENS = 96
MOST_SESSIONS = 8
OPTIONS = {"max_new_tokens": TOKENS, "remember": False, "eos_token_id": ()}
PROMPTS = ("The king", "Once upon a time", "The old witch said", "A golden apple")


@pytest.fixture(scope="module")
def base():
    return BaseModel.from_pretrained("bundled:tiny")


@pytest.fixture(scope="module")
def engines(base, tmp_path_factory):
    """Each has its own memory, longer than the window (W = 1,024)."""
    folder = tmp_path_factory.mktemp("benchmark")
    text = read_book(DemoConfig(max_characters=HISTORY_CHARACTERS))
    engines = []
    for index in range(MOST_SESSIONS):
        memory = Memory.create(folder / f"{index}.mctx", Engine.identity(base))
        engines.append(Engine(base, memory))
        engines[-1].ingest(text[index * 2_000 :])
    yield engines
    for engine in engines:
        engine.memory.close()


def one_after_the_other(engines, count):
    for engine, prompt in zip(engines[:count], cycle(PROMPTS), strict=False):
        list(engine.generate(prompt, **OPTIONS))


def together(engines, count):
    with SessionBatch(engines[0].base) as batch:
        for engine, prompt in zip(engines[:count], cycle(PROMPTS), strict=False):
            batch.add(engine, prompt, **OPTIONS)
        list(batch)


@pytest.mark.parametrize("count", [1, 4, MOST_SESSIONS])
@pytest.mark.parametrize("way", [one_after_the_other, together], ids=lambda way: way.__name__)
def test_decode(benchmark, engines, count, way):
    benchmark.group = f"{TOKENS} tokens of each of {count} sessions"
    benchmark.pedantic(lambda: way(engines, count), rounds=3, warmup_rounds=1)
