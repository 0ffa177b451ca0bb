from __future__ import annotations

import pytest
import torch

from megacontext.evaluation.long_questions import LongQuestion
from megacontext.tasks.documents import CONCLUSION

ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
GIFTS = ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk")


def asked(metric, answers, question="Where is Mary?", labels=()):
    nothing = torch.empty(0, dtype=torch.int64)
    return LongQuestion("any", nothing, question, tuple(answers), (), metric, tuple(labels))


def test_the_prompt_is_what_the_models_were_trained_on():
    assert asked("exact", ["garden"]).prompt == "\nQuestion: Where is Mary?\nAnswer:"


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" garden", True),
        (" garden\n", True),
        (f" Mary went to the garden.{CONCLUSION} garden", True),
        (f" Mary went to the garden.{CONCLUSION} office", False),
        (" Garden", False),
        (" garden.", False),
        (" the garden", False),
        ("", False),
    ],
)
def test_exact(written, right):
    assert asked("exact", ["garden"]).is_right(written) is right


@pytest.mark.parametrize(
    ("written", "score"),
    [
        (" 123, 456", 1),
        (" 456 and then 123.", 1),
        (" They are 91234 and 456", 1),  # as RULER matches: anywhere
        (" 123", 0.5),
        (f" 123, 456{CONCLUSION} 123", 0.5),
        (" 12 3", 0),
        ("", 0),
    ],
)
def test_all_of(written, score):
    question = asked("all_of", ["123", "456"])
    assert question.score(written) == score
    assert question.is_right(written) is (score == 1)


def test_all_of_does_not_mind_the_case():
    assert asked("all_of", ["VXQ", "kap"]).is_right(" vxq KAP")


@pytest.mark.parametrize(
    ("written", "right"),
    [
        (" kitchen", True),
        (" Kitchen", True),
        ("Mary is in the KITCHEN now. Before, she was in the garden.", True),
        (" kitchen\nQuestion: Where is Bill?\nAnswer: garden", True),
        ("the kitchen or the garden", False),
        ("kitchen kitchen", True),
        (f" Mary went to the garden.{CONCLUSION} kitchen", True),
        ("She left. The kitchen", False),  # only the first sentence counts
        ("garden", False),
        ("I do not know", False),
        ("the kitchenette", False),
        ("", False),
    ],
)
def test_babilong(written, right):
    assert asked("babilong", ["kitchen"], labels=ROOMS).is_right(written) is right


def test_labels_of_the_question_do_not_count():
    question = asked("babilong", ["bedroom"], "What is the bathroom east of?", ROOMS)
    assert question.is_right("the bathroom is east of the bedroom")
    assert not question.is_right("the bathroom")
    who = asked("babilong", ["Fred"], "Who gave the football to Jeff?", GIFTS)
    assert who.is_right("Fred gave the football to Jeff.")
    assert not who.is_right("Bill gave Fred the football")


def test_a_label_within_another_word_does_not_count():
    counts = ("none", "one", "three", "two")
    question = asked("babilong", ["none"], "How many objects is Mary carrying?", counts)
    assert question.is_right("none")
    assert not question.is_right("one")
    sure = asked("babilong", ["no"], "Is Mary in the garden?", ("maybe", "no", "yes"))
    assert sure.is_right("No, she is not.")
    assert not sure.is_right("I know nothing.")


def test_lists_are_right_in_any_order_but_whole():
    things = ("apple", "football", "milk", "nothing")
    question = asked("babilong", ["football,apple"], "What is Mary carrying?", things)
    assert question.is_right("apple,football")
    assert question.is_right("an apple and a football")
    assert not question.is_right("apple")
    assert not question.is_right("apple, football, milk")
