"""Every planted fact is answered by the newest statement about its subject, and by no other."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.tasks.fact_themes import ATTRIBUTES, UNKNOWN, FactThemes

SEEDS = st.integers(0, 2**32 - 1)
SPLITS = st.sampled_from(["train", "held_out"])
COUNTS = st.integers(1, 20)

DRAWS = {
    "attributes": lambda facts, count: facts.attributes(count),
    "codes": lambda facts, count: facts.codes(count),
    "hidings": lambda facts, count: facts.hidings(count),
    "plain": lambda facts, count: facts.plain(count),
    "key_list": lambda facts, count: facts.key_list(count),
    "variables": lambda facts, count: facts.variables(count, 4),
}
CODE_ASKS = (
    "What is the secret code of the (.+)?",
    "What is the number of the (.+)?",
    "Which number belongs to the (.+)?",
    "What is the special magic number for (.+) mentioned in the text?",
)
HIDING_ASKS = (
    "Where is the (.+?)(?: hidden)??",
    "Where can one find the (.+)?",
)
SEVERAL_ASKS = (
    r"What are all the special magic numbers for (.+) mentioned in the text\?",
    r"Which numbers does the (.+) have\?",
    r"What are all the codes of the (.+)\?",
)
PERSON_ASKS = tuple(
    question.replace("{n}", "(.+)") for attribute in ATTRIBUTES for question in attribute.questions
)
ASKS = [
    re.compile(pattern.removesuffix("?") + re.escape("?"))
    for pattern in (
        *CODE_ASKS,
        *HIDING_ASKS,
        *PERSON_ASKS,
        "What is the value of key (.+)?",
        "What is the value of VAR (.+)?",
    )
]


def theme_of(seed, kind, count, split="train"):
    return DRAWS[kind](FactThemes(random.Random(seed), split), count)


def subject_of(question):
    for pattern in ASKS:
        if match := pattern.fullmatch(question):
            return match.group(1)
    raise AssertionError(f"no question of a fact: {question!r}")


def mentions(text, words):
    return re.search(rf"\b{re.escape(words)}\b", text) is not None


@pytest.mark.parametrize("kind", [kind for kind in DRAWS if kind != "variables"])
@settings(max_examples=40)
@given(seed=SEEDS, count=COUNTS, split=SPLITS)
def test_the_newest_statement_about_the_subject_holds_the_answer(kind, seed, count, split):
    theme = theme_of(seed, kind, count, split)
    for question in theme.questions:
        subject = subject_of(question.text)
        about = [i for i, text in enumerate(theme.statements, 1) if mentions(text, subject)]
        if question.answer == UNKNOWN:
            assert question.family == "unknown"
            assert question.after == 0
            joined = " ".join(theme.statements).lower()
            assert not any(mentions(joined, word) for word in subject.lower().split()[-1:])
            continue
        # A later statement would change the answer, one before would make it ambiguous.
        assert question.after == about[-1]
        assert mentions(theme.statements[question.after - 1], question.answer)
        assert len(about) == (2 if question.family == "correction" else 1)
        if question.family == "correction":
            assert about[0] == about[1] - 1
            assert not mentions(
                theme.statements[about[0] - 1].replace(subject, ""), question.answer
            )


@settings(max_examples=60)
@given(seed=SEEDS, chains=st.integers(1, 8), hops=st.integers(1, 4), split=SPLITS)
def test_variables_resolve_through_their_chain(seed, chains, hops, split):
    theme = FactThemes(random.Random(seed), split).variables(chains, hops)
    known = {}
    for statement in theme.statements:
        name, value = re.fullmatch(r"VAR (\w{3}) = (?:VAR )?(\w+)\.", statement).groups()
        assert name not in known
        known[name] = known.get(value, value)
    assert len(theme.questions) == len(theme.statements)
    for question in theme.questions:
        name = subject_of(question.text)
        assert question.answer == known[name]
        assert len(question.answer) == 5
        assert theme.statements[question.after - 1].startswith(f"VAR {name} =")


@settings(max_examples=40)
@given(seed=SEEDS, count=COUNTS, split=SPLITS)
def test_plain_facts_have_one_question_each_in_order(seed, count, split):
    theme = theme_of(seed, "plain", count, split)
    assert len(theme.statements) == len(theme.questions) == count
    assert [question.after for question in theme.questions] == list(range(1, count + 1))
    numbers = [q for q in theme.questions if q.family == "code"]
    assert len(numbers) == (count + 1) // 2
    assert all(re.fullmatch(r"[1-9]\d{4}", question.answer) for question in numbers)


@settings(max_examples=40)
@given(seed=SEEDS, count=COUNTS, length=st.integers(1, 9))
def test_numbers_have_the_asked_length(seed, count, length):
    facts = FactThemes(random.Random(seed))
    for theme in (facts.codes(count, length), facts.key_list(count, min(length, 6))):
        answers = [q.answer for q in theme.questions if q.answer != UNKNOWN]
        size = length if theme.questions[0].family != "key" else min(length, 6)
        assert all(len(answer) == size and answer.isdigit() for answer in answers)


@settings(max_examples=40)
@given(seed=SEEDS, count=st.integers(1, 40), split=SPLITS)
def test_keys_differ_in_more_than_case(seed, count, split):
    theme = theme_of(seed, "key_list", count, split)
    keys = [subject_of(question.text).lower() for question in theme.questions]
    assert len(set(keys)) == count


@pytest.mark.parametrize("kind", DRAWS)
def test_themes_are_functions_of_their_seed_and_differ(kind):
    assert theme_of(5, kind, 6) == theme_of(5, kind, 6)
    drawn = [tuple(theme_of(seed, kind, 6).statements) for seed in range(30)]
    assert len(set(drawn)) == 30


@settings(max_examples=60)
@given(seed=SEEDS, count=COUNTS, split=SPLITS)
def test_several_codes_are_asked_for_together_in_the_order_they_were_told(seed, count, split):
    theme = FactThemes(random.Random(seed), split).several_codes(count)
    assert 1 <= len(theme.statements) <= count
    told = 0
    for question in theme.questions:
        subject = next(
            match.group(1)
            for pattern in SEVERAL_ASKS
            if (match := re.fullmatch(pattern, question.text))
        )
        about = [i for i, text in enumerate(theme.statements, 1) if mentions(text, subject)]
        numbers = [re.search(r"\b\d{3,7}\b", theme.statements[i - 1]).group() for i in about]
        assert question.answer == ", ".join(numbers)
        assert 1 <= len(numbers) <= 4
        assert (question.after, question.family, question.lasting) == (about[-1], "codes", True)
        told += len(about)
    # Nothing is told that is not asked for.
    assert told == len(theme.statements)


def test_things_have_one_to_four_codes():
    counts = Counter(
        question.answer.count(",") + 1
        for seed in range(40)
        for question in FactThemes(random.Random(seed)).several_codes(12).questions
    )
    assert set(counts) == {1, 2, 3, 4}


def test_places_are_asked_in_vain_as_often_as_said():
    themes = [theme_of(seed, "hidings", 3) for seed in range(300)]
    in_vain = [sum(q.family == "unknown" for q in theme.questions) for theme in themes]
    assert set(in_vain) == {0, 1}
    assert sum(in_vain) / 300 == pytest.approx(0.2, abs=0.07)


def test_copies_repeat_the_list():
    for seed in range(20):
        first, again = FactThemes(random.Random(seed)).copy(8)
        assert first == f"\nList:{again.rstrip()}\nList again:"
        assert (first, again) == FactThemes(random.Random(seed)).copy(8)


def test_corrections_unknown_and_repeated_questions_occur_as_often_as_said():
    counts = Counter()
    for seed in range(300):
        theme = theme_of(seed, "attributes", 6)
        counts["facts"] += 6
        counts["corrected"] += len(theme.statements) - 6
        counts["unknown"] += sum(q.family == "unknown" for q in theme.questions)
    assert counts["corrected"] / counts["facts"] == pytest.approx(1 / 6, abs=0.03)
    assert counts["unknown"] / 300 == pytest.approx(0.3, abs=0.08)
