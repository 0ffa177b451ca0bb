"""Documents keep every statement, and ask each question where its evidence has just been read."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.tasks.documents import Question, Theme
from megacontext.tasks.recall_documents import Prose, RecallDocuments
from megacontext.tasks.story_world import STORY_KINDS

SEEDS = st.integers(0, 2**32 - 1)
NOISE = st.lists(
    st.sampled_from(
        ["The sun rose.", "“Who?” he said.", 'She left. "Oh!"', "Dr. No came!", "a\n\nb?", "Well…"]
    ),
    max_size=30,
).map(" ".join)


@st.composite
def themes(draw):
    """Themes whose statements and questions can be told apart by their text."""
    drawn = []
    for number in range(draw(st.integers(1, 3))):
        count = draw(st.integers(1, 8))
        lead = draw(st.sampled_from(["", "\n"]))
        statements = [f"{lead}S{number}.{i} stands." for i in range(count)]
        questions = [
            Question(f"Q{number}.{i}?", f"A{number}.{i}", after, f"f{number}", lasting)
            for i, (after, lasting) in enumerate(
                draw(st.lists(st.tuples(st.integers(0, count), st.booleans()), max_size=6))
            )
        ]
        drawn.append(Theme(statements, questions))
    return drawn


def documents(seed=0, texts=("A text.",), split="train", **shares):
    return RecallDocuments(random.Random(seed), Prose(texts), split, **shares)


def asked_at(pieces, question):
    text = f"Question: {question.text}\nAnswer:"
    return next(i for i, piece in enumerate(pieces) if piece.text.lstrip("\n") == text)


@settings(max_examples=60)
@given(seed=SEEDS, drawn=themes(), noise=NOISE)
def test_every_question_stands_where_it_has_one_answer(seed, drawn, noise):
    pieces = documents(seed).scatter(drawn, noise)
    places = {
        piece.text.strip(): (i, piece.mark)
        for i, piece in enumerate(pieces)
        if piece.kind == "statement"
    }
    for theme in drawn:
        order = [places[statement.strip()] for statement in theme.statements]
        assert order == sorted(order)
        for question in theme.questions:
            at = asked_at(pieces, question)
            evidence = order[question.after - 1] if question.after else (-1, -1)
            assert at > evidence[0]
            if not question.lasting and question.after < len(order):
                assert at < order[question.after][0]
            answer = pieces[at + 1]
            assert (answer.kind, answer.text) == ("answer", f" {question.answer}\n")
            assert (answer.family, answer.mark) == (question.family, evidence[1])


@settings(max_examples=60)
@given(seed=SEEDS, drawn=themes(), noise=NOISE)
def test_nothing_is_lost_and_sentences_are_apart(seed, drawn, noise):
    pieces = documents(seed).scatter(drawn, noise)
    statements = [s for theme in drawn for s in theme.statements]
    questions = [q for theme in drawn for q in theme.questions]
    marks = [piece.mark for piece in pieces if piece.kind == "statement"]
    assert len(set(marks)) == len(marks)
    found = sorted(piece.text.strip() for piece in pieces if piece.kind == "statement")
    assert found == sorted(statement.strip() for statement in statements)
    for kind in ("question", "answer"):
        assert sum(piece.kind == kind for piece in pieces) == len(questions)
    prose = "".join(piece.text for piece in pieces if piece.kind == "prose")
    assert "".join(prose.split()) == "".join(noise.split())
    for left, right in itertools.pairwise(pieces):
        assert left.text
        assert left.text[-1].isspace() or right.text[0].isspace()
        assert not (left.text.endswith("\n") and right.text.startswith("\n"))
        assert not (left.text.endswith(" ") and right.text.startswith(" "))


@settings(max_examples=60)
@given(seed=SEEDS, tokens=st.integers(48, 400), split=st.sampled_from(["train", "held_out"]))
def test_drawn_documents_are_about_as_long_as_asked_and_repeatable(seed, tokens, split):
    texts = ["Once there was a cat. It sat. " * 40, "The sea was calm. Nobody spoke. " * 60]
    pieces = documents(seed, texts, split).draw(tokens)
    assert pieces == documents(seed, texts, split).draw(tokens)
    assert sum(len(piece.text) for piece in pieces) < 3.3 * tokens * 3 + 900
    marks = {piece.mark for piece in pieces if piece.kind == "statement"}
    assert marks
    assert all(piece.mark in marks | {-1} for piece in pieces if piece.kind == "answer")


@settings(max_examples=60)
@given(seed=SEEDS, characters=st.integers(1, 500), sentences=st.integers(1, 60))
def test_prose_begins_with_a_sentence_where_it_can(seed, characters, sentences):
    text = " ".join(f"Sentence {i} ends here." for i in range(sentences))
    part = Prose([text]).slice(random.Random(seed), characters)
    assert 0 < len(part) <= characters
    assert part in text
    assert part.startswith("Sentence"[: len(part)])


@pytest.mark.parametrize(
    ("share", "low", "high"), [(0.0, 0.0, 0.0), (0.5, 0.35, 0.65), (1.0, 1, 1)]
)
def test_so_many_documents_tell_a_story(share, low, high):
    drawn = [documents(seed, ["It was night. "] * 9, story_share=share) for seed in range(150)]
    stories = 0
    for document in drawn:
        pieces = document.draw(200)
        families = {piece.family for piece in pieces if piece.kind == "answer"}
        # A story in which nothing could be asked has statements only.
        stories += families <= {*STORY_KINDS, "holder"}
    assert low <= stories / len(drawn) <= high


def test_documents_of_facts_have_every_kind_of_question():
    families = {
        piece.family
        for seed in range(200)
        for piece in documents(seed, story_share=0.0).draw(300)
        if piece.kind == "answer"
    }
    assert {"attribute", "code", "codes", "hiding", "synonym", "unknown", "correction"} < families
    assert families.isdisjoint(STORY_KINDS)
