from __future__ import annotations

from itertools import islice

import pytest
from tiny_models import tiny_base_model

from megacontext.errors import DataError
from megacontext.evaluation.babi import read_babi
from megacontext.evaluation.babilong_questions import babilong_questions
from megacontext.evaluation.noise import NoiseTokens

BASE = tiny_base_model()
NOISE = NoiseTokens(BASE, [" ".join(f"Noise number {i}." for i in range(300))])
STORY = (
    "1 Mary moved to the bathroom.\n"
    "2 John went to the hallway.\n"
    "3 Where is Mary? \tbathroom\t1\n"
    "4 Mary went to the garden.\n"
    "5 Where is Mary? \tgarden\t4\n"
    "1 Bill took the apple.\n"
    "2 Bill got the milk there.\n"
    "3 What is Bill carrying?\tapple,milk\t1 2\n"
)
FILE = "qa8_lists-sets_test.txt"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / FILE).write_text(STORY)
    return tmp_path


def ask(folder, count=9, length=500, seed=0):
    return babilong_questions(NOISE, folder, "qa8", count=count, length=length, seed=seed)


def said(question):
    return [BASE.decode(question.history[a:b]) for a, b in question.evidence]


def test_every_question_of_the_file_is_asked_with_its_story_in_order(folder):
    published = {(q.question, q.answer): q for q in read_babi(folder / FILE)}
    asked = list(ask(folder))
    assert {(q.question, q.answers[0]) for q in asked} == set(published)
    for question in asked:
        source = published[question.question, question.answers[0]]
        text = BASE.decode(question.history)
        places = [text.index(f" {sentence}") for sentence in source.story]
        assert places == sorted(places)
        assert len(question.history) == 500
        assert said(question) == [f" {source.story[i]}" for i in source.evidence]
        assert question.labels == ("apple", "bathroom", "garden", "milk")
        assert question.is_right(f" {source.answer}")


def test_without_length_the_story_stands_alone(folder):
    for question in ask(folder, length=0):
        text = BASE.decode(question.history)
        assert "Noise" not in text
        whole = text + question.prompt
        assert whole in {source.prompt for source in read_babi(folder / FILE)}
        assert all(sentence.strip() in text for sentence in said(question))


def test_the_same_seed_asks_the_same_whatever_the_length(folder):
    first, again = list(ask(folder)), list(ask(folder))
    for one, other in zip(first, again, strict=True):
        assert one.history.equal(other.history)
    longer = [q.question for q in ask(folder, length=900)]
    assert longer == [q.question for q in first]
    orders = {tuple(q.answers[0] for q in ask(folder, seed=seed)) for seed in range(12)}
    assert len(orders) > 1


def test_stories_that_do_not_fit_are_passed_over(folder):
    asked = list(ask(folder, length=70))
    assert sorted(q.answers[0] for q in asked) == ["apple,milk", "bathroom"]
    with pytest.raises(DataError, match="no story fits a history of 9 tokens"):
        list(ask(folder, length=9))


def test_histories_are_made_one_by_one(folder):
    assert len(list(islice(ask(folder, length=10**6), 1))) == 1
    assert len(list(ask(folder, count=2))) == 2
    assert list(ask(folder, count=0)) == []
