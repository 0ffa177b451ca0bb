from __future__ import annotations

import re
from collections import Counter
from itertools import islice

import pytest
from tiny_models import tiny_base_model

from megacontext.errors import ConfigError, InputError
from megacontext.evaluation.noise import NoiseTokens
from megacontext.evaluation.ruler_questions import RulerConfig, ruler_questions

BASE = tiny_base_model()
NOISE = NoiseTokens(BASE, [" ".join(f"Noise word {i}." for i in range(900))])
FINDING = {
    "niah_single": (1, 1),
    "niah_multikey": (1, 1),
    "niah_multivalue": (4, 4),
    "niah_multiquery": (4, 4),
    "vt": (5, 5),
}
WORDINGS = ("ruler", "plain")


def ask(task, count=3, length=6000, seed=0, **own):
    config = RulerConfig.parse({"task": task} | own)
    return ruler_questions(NOISE, config, count=count, length=length, seed=seed)


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("task", FINDING)
def test_the_evidence_holds_the_answers(task, wording):
    answers, spans = FINDING[task]
    if task == "vt" and wording == "plain":
        answers = 1
    for question in ask(task, wording=wording):
        assert (len(question.answers), len(question.evidence)) == (answers, spans)
        assert len(question.history) == 6000
        told = " ".join(BASE.decode(question.history[a:b]) for a, b in question.evidence)
        assert all(answer in told for answer in question.answers)
        assert question.is_right(f" {', '.join(question.answers)}\n")
        assert not question.is_right(" none\n")


def test_the_needle_stands_at_its_depth():
    for depth in (0.0, 0.3, 1.0):
        for question in ask("niah_single", depth=depth):
            [(start, _)] = question.evidence
            assert start == pytest.approx(depth * 6000, abs=120)


@pytest.mark.parametrize("length", [3000, 9000])
def test_common_words_fill_the_history(length):
    often, seldom = (6, 1) if length < 4096 else (30, 3)
    for question in ask("cwe", length=length):
        [(start, end)] = question.evidence
        assert end == length == len(question.history)
        assert start <= length // 20
        words = re.findall(r"\d+\. (\w+)", BASE.decode(question.history[start:end]))
        counts = Counter(words)
        assert set(counts.values()) == {often, seldom}
        assert {word for word, count in counts.items() if count == often} == set(question.answers)
        assert "Noise" not in BASE.decode(question.history[start:end])


def test_frequent_words_fill_the_history():
    for question in ask("fwe"):
        [(start, end)] = question.evidence
        assert end == len(question.history) == 6000
        assert start <= 300
        counts = Counter(BASE.decode(question.history[start:end]).split())
        assert tuple(word for word, _ in counts.most_common(4))[1:] == question.answers


@pytest.mark.parametrize("task", [*FINDING, "cwe", "fwe"])
def test_the_same_seed_asks_the_same(task):
    first, again = list(ask(task)), list(ask(task))
    for one, other in zip(first, again, strict=True):
        assert (one.question, one.answers, one.evidence) == (
            other.question, other.answers, other.evidence,
        )  # fmt: skip
        assert one.history.equal(other.history)
    other_seed = next(ask(task, seed=1))
    assert not other_seed.history.equal(first[0].history)
    assert other_seed.answers != first[0].answers
    assert first[1].answers != first[0].answers


@pytest.mark.parametrize("task", FINDING)
def test_every_length_asks_the_same(task):
    short, long = next(ask(task, length=2000)), next(ask(task, length=30_000))
    assert (short.question, short.answers) == (long.question, long.answers)


def test_histories_are_made_one_by_one():
    assert len(list(islice(ask("niah_single", count=10**9), 2))) == 2


@pytest.mark.parametrize("task", ["niah_multikey", "cwe", "fwe"])
def test_what_does_not_fit_is_refused(task):
    with pytest.raises(InputError, match="history of 60"):
        list(ask(task, length=60))


def test_a_depth_outside_the_history_is_refused():
    with pytest.raises(ConfigError, match="depth"):
        RulerConfig.parse({"task": "niah_single", "depth": 1.5})
