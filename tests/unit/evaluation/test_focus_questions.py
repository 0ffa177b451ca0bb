from __future__ import annotations

import random
import re

import pytest
from focus_cases import write_babi

from megacontext.errors import DataError
from megacontext.evaluation.focus_names import OWN_THINGS
from megacontext.evaluation.focus_questions import FOCUS_KINDS, SEVERAL_LOOKS, group_batches
from megacontext.tasks.vocabulary import Vocabulary

SMALL = re.compile(r"\b[a-z]+\b")
# Capitalised words that are no subject: beginnings of statements, and cities, which are answers.
NO_NAMES = {"The", "You", "Somebody", "Remember", "Correction"}
NO_NAMES |= set(Vocabulary(random.Random(0), "held_out").words("city", 5))


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    babi = write_babi(tmp_path_factory.mktemp("babi"))
    return list(group_batches(groups=5, together=3, asked=2, seed=0, babi=babi))


def planted_of(batches, kind):
    return [one for batch in batches for group in batch for one in group if one.kind == kind]


def test_every_group_asks_as_much_of_every_kind(batches):
    assert [len(batch) for batch in batches] == [3, 2]
    for batch in batches:
        for group in batch:
            asked = [one.kind for one in group for _ in one.questions]
            assert sorted(asked) == sorted([*FOCUS_KINDS, *FOCUS_KINDS])


def test_no_question_of_a_history_is_about_what_another_one_is_about(batches):
    for batch in batches:
        themes = [one for group in batch for one in group]
        for one in themes:
            others = " ".join(s for other in themes if other is not one for s in other.statements)
            names = {word for s in one.statements for word in re.findall(r"\b[A-Z]\w+", s)}
            names -= NO_NAMES
            things = {word for s in one.statements for word in SMALL.findall(s)} & set(OWN_THINGS)
            for word in names | things:
                assert not re.search(rf"\b{word}\b", others), (word, one)


def test_questions_need_as_many_statements_as_their_kind_says(batches):
    facts = {"two_hop": 2, "three_hop": 3, "babi_qa2": 2, "babi_qa3": 3, "none": 0}
    for kind in FOCUS_KINDS:
        for one in planted_of(batches, kind):
            for question in one.questions:
                assert len(set(question.needed)) == facts.get(kind, 1)
                assert all(0 <= index < len(one.statements) for index in question.needed)
                assert bool(question.notes) == (kind in SEVERAL_LOOKS)


def test_the_newest_statement_corrects_the_one_before(batches):
    for one in planted_of(batches, "corrected"):
        (question,) = one.questions
        assert len(one.statements) == 2
        assert question.needed == (1,)
        assert question.answer in one.statements[1]
        assert question.answer not in one.statements[0]


def test_single_facts_state_their_answer(batches):
    for kind in ("same_words", "codes", "paraphrase"):
        for one in planted_of(batches, kind):
            assert one.questions[0].answer in one.statements[0]
            assert one.questions[0].answer.isdecimal() or kind != "codes"


def test_what_nothing_answers_is_named_nowhere(batches):
    for batch in batches:
        said = " ".join(s for group in batch for one in group for s in one.statements)
        for one in planted_of([batch], "none"):
            assert one.statements == ()
            (name,) = re.findall(r"\b[A-Z]\w+", one.questions[0].text)[1:]
            assert name not in said
            assert one.questions[0].answer == "unknown"


def test_published_stories_keep_their_order_and_places_under_new_names(batches):
    for one in planted_of(batches, "babi_qa3"):
        who, thing = one.statements[0].split()[0], one.questions[0].text.split()[3]
        other = one.statements[2].split()[0]
        assert one.statements == (
            f"{who} went to the garden.",
            f"{who} got the {thing} there.",
            f"{other} moved to the bedroom.",
            f"{who} travelled to the hallway.",
        )
        assert one.questions[0].text == f"Where was the {thing} before the hallway?"
        assert one.questions[0].answer == "garden"
        assert one.questions[0].needed == (1, 3, 0)
        assert thing in OWN_THINGS
        assert not {"Mary", "John"} & {who, other}


def test_without_the_published_files_their_kinds_are_left_out():
    (batch,) = group_batches(groups=1, together=1, asked=1, seed=0)
    assert {one.kind for one in batch[0]} == set(FOCUS_KINDS) - {"babi_qa2", "babi_qa3"}


def test_questions_are_a_function_of_the_seed():
    first, again, other = (
        list(group_batches(groups=2, together=2, asked=1, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(DataError, match="qa2"):
        list(group_batches(groups=1, together=1, asked=1, seed=0, babi=tmp_path))
