from __future__ import annotations

import pytest
from tiny_models import tiny_base_model

from megacontext.errors import ConfigError
from megacontext.evaluation.focus_histories import Histories
from megacontext.evaluation.focus_questions import group_batches
from megacontext.evaluation.noise import NoiseTokens

BASE = tiny_base_model()
NOISE = NoiseTokens(BASE, ["The old king sat by the fire. Nobody spoke a word. " * 400])
BATCHES = list(group_batches(groups=4, together=3, asked=1, seed=0))
LENGTHS = (5_000, 40_000)


@pytest.fixture(scope="module")
def made():
    histories = Histories(NOISE, BATCHES, seed=0)
    return {length: list(histories.of_length(length)) for length in LENGTHS}


def test_evidence_is_where_its_span_says(made):
    for length, histories in made.items():
        for history in histories:
            assert len(history.tokens) == length
            for question in history.questions:
                for (start, end), said in zip(question.evidence, question.needed, strict=True):
                    assert BASE.decode(history.tokens[start:end]) == f" {said}"


def test_evidence_is_told_in_the_order_of_its_theme(made):
    for history in made[LENGTHS[0]]:
        for question in history.questions:
            assert list(question.evidence) == sorted(question.evidence)


def test_the_same_questions_have_the_same_numbers_at_every_length(made):
    asked = [
        {(one.kind, one.number): one.asked for history in made[length] for one in history.questions}
        for length in LENGTHS
    ]
    assert asked[0] == asked[1]
    assert len(asked[0]) == sum(len(h.questions) for h in made[LENGTHS[0]])


def test_longer_histories_hold_more_groups_but_never_two_batches(made):
    assert len(made[LENGTHS[0]]) == 4
    assert len(made[LENGTHS[1]]) == 2


def test_blocks_are_those_that_the_evidence_touches(made):
    question = next(q for q in made[LENGTHS[0]][0].questions if len(q.evidence) == 1)
    ((start, end),) = question.evidence
    assert question.blocks(32) == list(range(start // 32, (end - 1) // 32 + 1))


def test_histories_are_a_function_of_the_seed(made):
    again = next(Histories(NOISE, BATCHES, seed=0).of_length(LENGTHS[0]))
    other = next(Histories(NOISE, BATCHES, seed=1).of_length(LENGTHS[0]))
    assert again.tokens.equal(made[LENGTHS[0]][0].tokens)
    assert not other.tokens.equal(again.tokens)


def test_a_group_that_leaves_no_room_for_noise_is_refused():
    with pytest.raises(ConfigError, match="asked"):
        next(Histories(NOISE, BATCHES, seed=0).of_length(500))
