from __future__ import annotations

import random

import pytest

from megacontext.tasks import vocabulary
from megacontext.tasks.vocabulary import Vocabulary, in_split

KINDS = ("name", "city", "job", "animal", "colour", "food", "instrument", "thing", "place",
         "adjective")  # fmt: skip
LISTS = {name: value for name, value in vars(vocabulary).items() if name[1:].isupper()}


def drawn(split, draw, n=400):
    rng = random.Random(0)
    words = Vocabulary(rng, split)
    return {word.lower() for _ in range(n) for word in draw(words).split()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_splits_share_no_word_and_lose_none(kind):
    parts = {
        split: set(Vocabulary(random.Random(0), split).words(kind, size))
        for split in ("train", "held_out")
        for size in [Vocabulary(random.Random(0), split).size(kind)]
    }
    assert parts["train"].isdisjoint(parts["held_out"])
    assert len(parts["train"]) > len(parts["held_out"]) >= 3
    listed = [words for words in LISTS.values() if parts["train"] <= set(words)]
    assert len(listed) == 1
    assert parts["train"] | parts["held_out"] == set(listed[0])


@pytest.mark.parametrize(
    "draw",
    [Vocabulary.person, Vocabulary.invented_name, Vocabulary.label, lambda v: v.value("city")],
    ids=["person", "invented_name", "label", "value"],
)
def test_what_is_drawn_stays_in_its_split(draw):
    train, held_out = drawn("train", draw), drawn("held_out", draw)
    assert train.isdisjoint(held_out)
    assert all(in_split(word, "train") for word in train)
    assert all(in_split(word, "held_out") for word in held_out)


def test_one_word_in_ten_is_held_out_whatever_its_case():
    words = [Vocabulary(random.Random(seed)).invented_name() for seed in range(5)]
    assert all(in_split(word.upper(), "train") for word in words)
    sample = [f"w{i}" for i in range(5000)]
    assert sum(in_split(word, "held_out") for word in sample) / 5000 == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_people_share_no_word(split):
    for seed in range(20):
        people = Vocabulary(random.Random(seed), split).people(25)
        words = [word for person in people for word in person.split()]
        assert len(people) == 25
        assert len(set(words)) == len(words)


@pytest.mark.parametrize("length", range(1, 10))
def test_numbers_have_exactly_the_asked_digits(length):
    words = Vocabulary(random.Random(0))
    assert all(len(words.digits(length)) == length for _ in range(50))


def test_no_list_names_a_word_twice():
    for name, words in LISTS.items():
        assert len(set(words)) == len(words), name


def test_asking_for_too_many_words_is_refused():
    words = Vocabulary(random.Random(0), "held_out")
    with pytest.raises(ValueError, match="larger than population"):
        words.words("place", words.size("place") + 1)
