"""Decoding timed by turns: who decodes when, what counts, and what the window shows."""

from __future__ import annotations

import time

import pytest
import torch
from engine_cases import config, new_engine, words
from tiny_models import tiny_base_model

from megacontext.errors import InputError
from megacontext.evaluation.cost_decode import (
    engine_arm,
    plain_arm,
    seconds_per_token,
    time_arms,
)
from megacontext.runtime.answer import DecodedToken


@pytest.fixture(scope="module")
def base():
    return tiny_base_model(max_positions=512)


def token(index):
    return DecodedToken(0, "a", index, 0)


def test_arms_take_turns_and_the_first_prompt_warms_up():
    called = []

    def arm(name, seconds):
        return lambda prompt: called.append((prompt, name)) or seconds

    arms = {"a": arm("a", 1.0), "b": arm("b", 2.0), "c": arm("c", 3.0)}
    times = time_arms(arms, ["0", "1", "2"])
    assert times.seconds == {"a": [1.0, 1.0], "b": [2.0, 2.0], "c": [3.0, 3.0]}
    assert "".join(name for _, name in called) == "abc" + "bca" + "cab"
    assert [prompt for prompt, _ in called] == ["0"] * 3 + ["1"] * 3 + ["2"] * 3


def test_what_comes_before_the_first_token_does_not_count():
    read = []

    def tokens():
        read.append("reading")
        yield token(5)
        read.append("decoding")
        yield from (token(6), token(9))

    def clock():
        return {1: 10.0, 2: 12.0}[len(read)]

    assert seconds_per_token(tokens(), clock) == 2.0 / 4


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_tokens_are_refused(count):
    with pytest.raises(InputError, match="fewer than two"):
        seconds_per_token(iter([token(3)] * count), time.perf_counter)


def test_the_plain_window_never_exceeds_its_size(base, monkeypatch):
    longest, prefilled = 0, []
    step, prefill = type(base).step, type(base).prefill

    def watched_step(self, inputs, positions, cache, **options):
        nonlocal longest
        logits = step(self, inputs, positions, cache, **options)
        longest = max(longest, cache.n_rows)
        return logits

    def watched_prefill(self, context, *rest, **options):
        prefilled.append(context.n_rows)
        return prefill(self, context, *rest, **options)

    monkeypatch.setattr(type(base), "step", watched_step)
    monkeypatch.setattr(type(base), "prefill", watched_prefill)
    history = torch.arange(100) % 50 + 40
    assert plain_arm(base, history, 30, time.process_time)("amber") > 0
    assert prefilled == [100 - 30]
    assert longest == 100


def test_a_plain_window_too_small_is_refused(base):
    with pytest.raises(InputError, match="no room"):
        plain_arm(base, torch.arange(20), 16, time.process_time)("amber birch")


def test_an_engine_refocuses_after_every_block_and_returns(base, tmp_path):
    engine = new_engine(tmp_path, base, config=config(budget=320))
    engine.ingest(words(900))
    arm = engine_arm(engine, 64, time.process_time)
    spans, rounds = engine.context.spans(), engine.focus.state.round
    assert arm("amber") > 0
    assert torch.equal(engine.context.spans(), spans)
    assert engine.memory.n_tokens == 900
    looks = [record.round for record in engine.focus.records if record.round > rounds]
    first = sum(1 for record in engine.focus.records if record.round > rounds) - 2
    assert len(looks) == first + 2, "one look behind each of two blocks"
    assert 1 <= first <= engine.config.refocus_rounds


def test_an_engine_that_remembers_grows(base, tmp_path):
    engine = new_engine(tmp_path, base, config=config(budget=320))
    engine.ingest(words(900))
    engine_arm(engine, 32, time.process_time, remember=True)("amber")
    assert engine.memory.n_tokens == 900 + len("amber") + 33
