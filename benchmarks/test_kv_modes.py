"""KV ``incremental`` beside ``exact``: what a refocus costs, and what the predictions lose.

Run with ``./bootstrap pytest benchmarks/test_kv_modes.py --benchmark-enable -s``. Every number is a
ratio or a difference of things measured by turns in one run; the lines printed have them.
"""

from __future__ import annotations

import itertools
import os
import random
from statistics import median

import pytest

from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.evaluation.kv_modes import compare_on_answers, compare_on_prose, refocus_times
from megacontext.evaluation.metrics import mean
from megacontext.evaluation.noise import NoiseTokens
from megacontext.evaluation.recall_questions import RecallConfig, recall_questions
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.companions import load_gistnet
from megacontext.runtime.engine import Engine, EngineConfig

MODEL = "bundled:tiny"
WINDOW = 1024
EDITS = 4
HISTORY_CHARACTERS = 120_000
# Multiplies the samples; the intervals shrink with its root.
SCALE = int(os.environ.get("KV_MODES_SCALE", "1"))
WORDS = ("king", "queen", "castle", "forest", "golden", "apple", "horse", "ring", "sword", "giant")
READERS = pytest.mark.parametrize("gistnet", ["bundled", "mean"])


def settings(**changes):
    halo = int(os.environ.get("KV_MODES_HALO", "0"))
    return EngineConfig.parse({"budget": WINDOW, "kv_halo": halo} | changes)


@pytest.fixture(scope="module")
def base():
    return BaseModel.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def noise(base):
    return NoiseTokens.read(base)


@READERS
def test_refocus(benchmark, base, gistnet, tmp_path):
    net = load_gistnet(gistnet, base, MODEL)
    rng = random.Random(0)
    queries = [" ".join(rng.sample(WORDS, 4)) for _ in range(60 * SCALE)]
    config = settings(allocator={"max_edits": EDITS, "cooldown": 0})
    with Memory.create(tmp_path / "speed.mctx", Engine.identity(base, net)) as memory:
        engine = Engine(base, memory, gistnet=net, config=config)
        engine.ingest(read_book(DemoConfig(max_characters=HISTORY_CHARACTERS)))
        times = benchmark.pedantic(lambda: refocus_times(engine, queries), rounds=1)
    chosen = [index for index, edits in enumerate(times.edits) if edits == EDITS]
    figures = {"n": len(chosen), "cost": engine.context.cost}
    for what, of in (("read", times.read.__getitem__), ("whole", times.whole)):
        exact, incremental = (
            [of(mode)[index] for index in chosen] for mode in ("exact", "incremental")
        )
        figures[f"{what}_exact_ms"] = round(median(exact), 2)
        figures[f"{what}_incremental_ms"] = round(median(incremental), 2)
        figures[f"{what}_ratio"] = round(sum(incremental) / sum(exact), 4)
    show(benchmark, f"refocus {gistnet}", figures)


@READERS
def test_prose(benchmark, base, noise, gistnet):
    net = load_gistnet(gistnet, base, MODEL)
    compared = benchmark.pedantic(
        lambda: list(
            itertools.chain.from_iterable(
                compare_on_prose(
                    base, net, settings(), noise, history=8192, blocks=33, seed=str(seed)
                )
                for seed in range(2 * SCALE)
            )
        ),
        rounds=1,
    )
    delta = mean([item.delta for item in compared])
    show(benchmark, f"prose {gistnet}", {"delta_nll": delta, "n": delta.n})


@READERS
@pytest.mark.parametrize("task", ["planted", "corrections"])
def test_answers(benchmark, base, noise, gistnet, task):
    net = load_gistnet(gistnet, base, MODEL)
    asked = RecallConfig(task=task, facts=40, asked=5)
    questions = recall_questions(noise, asked, count=20 * SCALE, length=8192, seed=0)
    compared = benchmark.pedantic(
        lambda: compare_on_answers(base, net, settings(), questions), rounds=1
    )
    delta = mean([item.delta for item in compared])
    figures = {
        "delta_nll": delta,
        "n": delta.n,
        "right_exact": sum(item.exact_right for item in compared),
        "right_incremental": sum(item.incremental_right for item in compared),
        "lost": sum(item.exact_right and not item.incremental_right for item in compared),
    }
    show(benchmark, f"answers {task} {gistnet}", figures)


def show(benchmark, name, figures):
    benchmark.extra_info.update({key: str(value) for key, value in figures.items()})
    print(f"\n{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))
