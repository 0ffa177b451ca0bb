"""A question about a synonym theme finds its statement by meaning only, never by a word."""

from __future__ import annotations

import random
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.tasks.synonym_themes import SynonymThemes

SEEDS = st.integers(0, 2**32 - 1)
SPLITS = st.sampled_from(["train", "held_out"])
STOP_WORDS = {"the", "of", "is", "does", "has", "that", "with", "to", "from", "for", "on", "in"}


def theme_of(seed, count, split="train"):
    return SynonymThemes(random.Random(seed), split).theme(count)


def words_of(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def told_about(statement):
    """Adjective and noun: the first that follow "the"."""
    return re.search(r"[Tt]he ([a-z]+ [a-z]+)", statement).group(1)


def asked_about(question):
    """Adjective and noun: the last that follow "the"."""
    return re.search(r".*the ([a-z]+ [a-z]+)", question.text).group(1)


def subjects_of(split):
    """Subjects of many statements and questions of a split."""
    themes = [theme_of(seed, 10, split) for seed in range(150)]
    told = {told_about(text) for theme in themes for text in theme.statements}
    return told | {asked_about(question) for theme in themes for question in theme.questions}


@settings(max_examples=60)
@given(seed=SEEDS, count=st.integers(1, 24), split=SPLITS)
def test_question_and_statement_share_no_content_word(seed, count, split):
    theme = theme_of(seed, count, split)
    assert len(theme.statements) == len(theme.questions) == count
    for number, (statement, question) in enumerate(
        zip(theme.statements, theme.questions, strict=True), 1
    ):
        shared = set(words_of(statement)) & set(words_of(question.text))
        assert shared <= STOP_WORDS, (statement, question)
        assert (question.after, question.family, question.lasting) == (number, "synonym", True)


def test_a_colour_in_the_question_is_not_its_answer():
    # "The pale guest owns a white cloak": which shade does the white visitor wear?
    for seed in range(400):
        themes = SynonymThemes(random.Random(seed))
        colours = ("white", "pale", "bright", "shining", "big", "large")
        themes.vocabulary.value = lambda kind, rng=themes.rng, words=colours: rng.choice(words)
        for question in themes.theme(4).questions:
            assert question.answer not in words_of(question.text), seed


@settings(max_examples=60)
@given(seed=SEEDS, count=st.integers(1, 24), split=SPLITS)
def test_the_statement_holds_the_answer(seed, count, split):
    theme = theme_of(seed, count, split)
    for statement, question in zip(theme.statements, theme.questions, strict=True):
        assert re.search(rf"\b{re.escape(question.answer)}\b", statement)


@settings(max_examples=60)
@given(seed=SEEDS, count=st.integers(2, 24), split=SPLITS)
def test_no_two_statements_are_about_the_same_thing(seed, count, split):
    theme = theme_of(seed, count, split)
    asked = [asked_about(question) for question in theme.questions]
    told = [told_about(text) for text in theme.statements]
    assert len(set(asked)) == len(set(told)) == count
    assert set(asked).isdisjoint(told)


def test_the_splits_share_no_subject():
    train, held_out = subjects_of("train"), subjects_of("held_out")
    assert len(train) > len(held_out) > 100
    assert train.isdisjoint(held_out)


def test_a_theme_is_a_function_of_its_seed():
    assert theme_of(3, 12) == theme_of(3, 12)
    assert len({tuple(theme_of(seed, 4).statements) for seed in range(30)}) == 30
