"""The comparison of KV modes: it sees a difference where there is one, and none where not."""

from __future__ import annotations

import itertools

import pytest
from engine_cases import config, learned_gistnet, new_engine, words
from tiny_models import tiny_base_model

from megacontext.evaluation.kv_modes import (
    compare_on_answers,
    compare_on_prose,
    question_times,
    refocus_times,
)
from megacontext.evaluation.long_questions import LongQuestion
from megacontext.evaluation.noise import NoiseTokens


@pytest.fixture(scope="module")
def base():
    return tiny_base_model(max_positions=512)


@pytest.fixture(scope="module")
def net(base):
    return learned_gistnet(base, slots=2)


def question(base, history):
    return LongQuestion(
        task="planted",
        history=base.encode(history),
        question="Where does the zebra sleep?",
        answers=("barn",),
        evidence=((0, 1),),
        metric="exact",
    )


def prose(base, net, **changes):
    noise = NoiseTokens(base, [words(3000) + "."])
    own = config(**changes)
    return compare_on_prose(base, net, own, noise, history=320, blocks=4, seed="a")


def test_prose_without_edits_is_the_same(base, net):
    compared = prose(base, net, budget=500, tail_tokens=450)
    assert len(compared) == 3
    assert all(abs(item.delta) < 1e-4 for item in compared)
    assert all(item.exact > 1 for item in compared)


def test_prose_with_edits_is_not_and_repeats(base, net):
    compared = prose(base, net)
    assert any(abs(item.delta) > 1e-4 for item in compared)
    assert compared == prose(base, net)


def test_answers(base, net):
    asked = question(base, words(700) + " The zebra sleeps in the blue barn. " + words(600, 1))
    compared = compare_on_answers(base, net, config(budget=320), iter([asked, asked]))
    assert len(compared) == 2
    assert compared[0] == compared[1], "each question starts from the coarsest window"
    assert abs(compared[0].delta) > 1e-5, "the focus must have fetched the evidence"


def test_refocus_times(base, net, tmp_path):
    engine = new_engine(tmp_path, base, gistnet=net, config=config(budget=320))
    engine.ingest(words(700) + " The zebra sleeps in the blue barn. " + words(600, 1))
    times = refocus_times(engine, ["xyz", "zebra", "iris kelp"])
    # Looks go on until nothing changes; the first query warms up.
    assert [time.look for time in times].count(0) == 2
    for time, following in itertools.pairwise(times):
        assert following.look == (time.look + 1 if time.edits else 0)
    assert times[0].edits > 0
    for time in times:
        assert min(time.focus, *time.read.values()) > 0
        for mode in ("exact", "incremental"):
            assert time.whole(mode) == time.focus + time.read[mode]


def test_question_times(base, net, tmp_path):
    engine = new_engine(tmp_path, base, gistnet=net, config=config(budget=320))
    engine.ingest(words(700) + " The zebra sleeps in the blue barn. " + words(600, 1))
    before = engine.focus.state.round
    found, nothing = question_times(engine, ["xyz", "zebra", "qqqq"])
    # A look that opens something is followed by another one, until the last one opens nothing.
    assert (found.look, nothing.look) == (2, 1)
    assert engine.focus.state.round - before == 4
    assert found.edits > 0 == nothing.edits
    for time in (found, nothing):
        assert min(time.focus, *time.read.values()) > 0
