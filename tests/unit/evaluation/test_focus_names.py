from __future__ import annotations

import random

from megacontext.evaluation.focus_names import OWN_THINGS, OwnNames
from megacontext.tasks.vocabulary import Vocabulary, in_split


def names(seed=0):
    return OwnNames(random.Random(seed))


def test_nothing_that_names_a_subject_is_given_out_twice():
    own = names()
    people = [name for _ in range(100) for name in own.people(4)]
    labels = [own.label() for _ in range(120)]
    things = [thing for _ in range(120) for thing in own.words("thing", 3)]
    for given in (people, labels, things):
        assert len(set(given)) == len(given)


def test_names_are_held_out_and_go_on_where_words_run_out():
    own = names()
    assert all(in_split(person, "held_out") for person in own.people(50))
    labels = [own.label() for _ in range(120)]
    assert " of " not in labels[0]
    assert " of " in labels[-1]
    things = own.words("thing", len(OWN_THINGS) + 1)
    assert set(things[:-1]) == set(OWN_THINGS)
    assert in_split(things[-1], "held_out")


def test_no_thing_is_a_word_of_training_texts():
    for split in ("train", "held_out"):
        vocabulary = Vocabulary(random.Random(0), split)
        for kind in vocabulary._lists:
            assert not set(OWN_THINGS) & set(vocabulary.words(kind, vocabulary.size(kind)))


def test_what_is_taken_back_is_given_out_again():
    own = names()
    own.label()
    given = own.given
    thing, label = own.thing(), own.label()
    assert own.given != given
    own.return_to(given)
    assert own.given == given
    assert own.thing() == thing
    assert label in {own.label() for _ in range(200)}


def test_other_words_are_those_of_the_vocabulary():
    assert set(names().words("place", 5)) == set(
        Vocabulary(random.Random(1), "held_out").words("place", 5)
    )
