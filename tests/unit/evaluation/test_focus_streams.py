from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.evaluation.focus_histories import FocusQuestion
from megacontext.evaluation.focus_streams import Models, refocus_cost, stream_prose
from megacontext.evaluation.noise import NoiseTokens
from megacontext.gistnet import GistNet
from megacontext.runtime.engine import EngineConfig
from megacontext.runtime.focus_policies import LexicalPolicy, RecencyPolicy
from megacontext.tasks.documents import Question

CONFIG = EngineConfig(budget=256, tail_tokens=32, query_tokens=16)
SIZE = 32


@pytest.fixture(scope="module")
def models():
    base = tiny_base_model("qwen3", max_positions=384)
    return Models(base, GistNet.untrained(base.d_model), None, CONFIG)


@pytest.fixture(scope="module")
def noise(models):
    words = "The old king sat by the fire. A fox ran over the hill. Nobody spoke a word. " * 30
    return NoiseTokens(models.base, [words])


def stream(models, noise, policy, path, blocks=4):
    return stream_prose(
        models, policy, noise, path / "m.mctx", history=700, blocks=blocks, seed="a"
    )


def test_a_stream_predicts_block_by_block_what_an_engine_predicts(models, noise, tmp_path):
    streamed = stream(models, noise, RecencyPolicy(), tmp_path)
    assert len(streamed.nll) == len(streamed.swap_rates) == len(streamed.chosen_rates) == 4
    # Recency asks for nothing: what it edits makes room.
    assert streamed.chosen_rates == [0.0] * 4
    # Room is made for several blocks at once, so not before every block.
    assert any(rate > 0 for rate in streamed.swap_rates)


def test_the_oracle_predicts_no_worse_and_chooses_edits(models, noise, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    told = stream(models, noise, None, tmp_path / "a", blocks=6)
    blind = stream(models, noise, RecencyPolicy(), tmp_path / "b", blocks=6)
    assert any(told.chosen_rates)
    assert sum(told.nll) < sum(blind.nll)


def test_the_first_block_is_predicted_from_the_newest_tokens(models, noise, tmp_path):
    import random

    streamed = stream(models, noise, RecencyPolicy(), tmp_path, blocks=1)
    tokens = noise.draw(random.Random("a"), 700 + SIZE)
    with models.memory(tokens[: 700 - 256], tmp_path / "other.mctx") as memory:
        engine = models.engine(memory)
        engine.ingestor.append(tokens[700 - 256 : 700])
        engine.focus.advance(700)
        nothing = torch.empty(0, dtype=torch.int64)
        engine.focus.refocus(nothing, reserve=SIZE)
        reading = engine.reader.read(engine.context, nothing, ahead=SIZE)
        expected = models.base.nll(reading, tokens[700:]).mean()
    assert streamed.nll[0] == pytest.approx(float(expected), abs=1e-5)


def test_a_refocus_is_timed_beside_a_step(models, noise, tmp_path):
    import random

    asked = [
        FocusQuestion("codes", i, Question("fox?", "hill", 1, "x"), ("fox",), ((0, 9),))
        for i in range(4)
    ]
    with models.memory(noise.draw(random.Random("b"), 600), tmp_path / "m.mctx") as memory:
        refocuses, steps = refocus_cost(models.engine(memory), LexicalPolicy(), asked)
    assert len(refocuses) == len(steps) == 3
    assert min(*refocuses, *steps) > 0
