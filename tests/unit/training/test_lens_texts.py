"""Texts for LensNet, against the same texts searched by hand: a byte is a token here."""

from __future__ import annotations

import itertools
import random
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_tokenizer
from tiny_training import corpus_documents

from megacontext.tasks.documents import QUESTION_TEMPLATE
from megacontext.tasks.recall_documents import Prose
from megacontext.training.lens_texts import AskedText, LensTexts

K = 32
TOKENIZER = tiny_tokenizer().backend_tokenizer
PROSE = Prose(corpus_documents())
TEXTS = LensTexts(TOKENIZER, PROSE, block_size=K)

numbers = st.integers(-10_000, 10_000)
facts = st.integers(1, 24)


def themes_of(texts, number, count):
    """What a text is made of: its own random numbers, drawn again."""
    rng = random.Random(f"lens texts/{texts.seed}/{texts.split}/{number}")
    return texts._themes(rng, count)


def written(text):
    return TOKENIZER.decode(text.tokens.tolist())


def spans_of(theme, text):
    """The blocks of each statement: the sentences of a theme stand in order."""
    spans, place = [], 0
    for statement in theme.statements:
        place = text.index(statement, place)
        end = place + len(statement)
        # The space before a word belongs to it, as in the tokens of larger vocabularies.
        first = place - (text[max(0, place - 1)] == " ")
        spans.append(range(first // K, (end - 1) // K + 1))
        place = end
    return spans


def blocks(spans, statements):
    return {block for statement in statements for block in spans[statement]}


def asks_by_question(text):
    found: dict[str, list[list]] = {}
    for ask in text.asks:
        looks = found.setdefault(ask.question, [])
        if not ask.noted:
            looks.append([])
        looks[-1].append(ask)
    return found


@given(numbers, facts, st.integers(100, 1500))
def test_evidence_is_where_the_statements_stand(number, count, tokens):
    text = TEXTS.draw(number, tokens, count)
    read = written(text)
    assert len(read) == len(text.tokens), "a byte is a token"
    told: set[int] = set()
    asked = asks_by_question(text)
    for theme in themes_of(TEXTS, number, count):
        spans = spans_of(theme, read)
        own = blocks(spans, range(len(spans)))
        told |= own
        for question in theme.questions:
            looks = asked[question.text].pop(0)
            needed = blocks(spans, question.needed)
            assert {block for ask in looks for block in ask.evidence} == needed
            for step, ask in enumerate(looks):
                assert list(ask.evidence) == sorted(set(ask.evidence))
                if question.notes:
                    assert set(spans[question.needed[step]]) <= set(ask.evidence)
                    assert ask.family == f"{question.family}.{step + 1}"
                else:
                    assert ask.family == question.family
                # Of a story all sentences are about the same; other facts are none of its business.
                others = own - set(ask.evidence) if theme.facts else set()
                assert ask.related == tuple(sorted(others))
    assert not any(asked.values()), "nothing else is asked"
    assert text.told == tuple(sorted(told))


@given(numbers, facts)
def test_the_looks_of_a_question_write_its_answer_piece_by_piece(number, count):
    text = TEXTS.draw(number, 200, count)
    asked = asks_by_question(text)
    for theme in themes_of(TEXTS, number, count):
        for question in theme.questions:
            looks = asked[question.text].pop(0)
            prompt, answer = (piece.text for piece in question.pieces())
            done = ""
            for ask in looks:
                assert ask.noted == done
                assert ask.query == question.text + done
                assert ask.prompt == QUESTION_TEMPLATE.format(question=question.text) + done
                assert ask.prompt.startswith(prompt)
                # A look ends where the engine looks again: behind a sentence.
                assert ask is looks[-1] or ask.target.endswith(".")
                done += ask.target
            assert done == answer


@given(numbers, facts)
def test_the_answer_is_read_in_the_evidence_of_the_last_look(number, count):
    text = TEXTS.draw(number, 200, count)
    asked = asks_by_question(text)
    for theme in themes_of(TEXTS, number, count):
        for question in theme.questions:
            last = asked[question.text].pop(0)[-1]
            if not question.needed:
                assert (last.family, last.target) == ("unknown", " unknown\n")
                assert not last.evidence
                continue
            seen = "".join(
                TOKENIZER.decode(text.tokens[block * K : (block + 1) * K].tolist())
                for block in last.evidence
            )
            for part in question.answer.split(", "):
                assert part in seen


@given(numbers)
def test_no_question_has_two_answers_in_one_text(number):
    """Two stories of the same people or things would contradict each other."""
    themes = themes_of(TEXTS, number, 40)
    stories = [theme for theme in themes if theme.facts]
    assert len(stories) <= 4
    for one, other in itertools.permutations(stories, 2):
        people = {statement.split()[0] for statement in one.statements}
        told = " ".join(other.statements)
        assert not any(re.search(rf"\b{name}\b", told) for name in people)
    answers: dict[str, set[str]] = {}
    for theme in themes:
        for question in theme.questions:
            answers.setdefault(question.text, set()).add(question.answer)
    assert all(len(found) == 1 for found in answers.values())


def test_texts_have_no_one_or_several_stories():
    drawn = [themes_of(TEXTS, n, facts) for n in range(30) for facts in (3, 40)]
    counts = [sum(bool(theme.facts) for theme in themes) for themes in drawn]
    assert {0, 1, 2, 3} <= set(counts)


def same(first: AskedText, second: AskedText) -> bool:
    return (
        torch.equal(first.tokens, second.tokens)
        and [vars(ask) for ask in first.asks] == [vars(ask) for ask in second.asks]
        and first.told == second.told
    )


def test_a_text_depends_on_seed_split_and_number_alone():
    drawn = TEXTS.draw(3, 400, 8)
    TEXTS.draw(9, 400, 8)
    random.seed(99)
    again = LensTexts(TOKENIZER, PROSE, "train", 0, K)
    assert same(again.draw(3, 400, 8), drawn)
    others = [
        again.draw(4, 400, 8),
        LensTexts(TOKENIZER, PROSE, "held_out", 0, K).draw(3, 400, 8),
        LensTexts(TOKENIZER, PROSE, "train", 1, K).draw(3, 400, 8),
    ]
    for other in others:
        assert not torch.equal(other.tokens, drawn.tokens)


@pytest.mark.parametrize("tokens", [64, 1000, 9000])
def test_texts_are_as_long_as_asked_even_where_books_are_short(tokens):
    assert max(map(len, PROSE.texts)) < 4000
    text = TEXTS.draw(0, tokens, 3)
    noise = len(text.tokens) - sum(
        len(statement) + 1 for theme in themes_of(TEXTS, 0, 3) for statement in theme.statements
    )
    # Sized for 3.3 characters a token, which is a byte here.
    assert 0.95 * 3.3 * tokens <= noise <= 1.05 * 3.3 * tokens + 10


def test_statements_are_scattered():
    text = TEXTS.draw(1, 2000, 16)
    n_blocks = len(text.tokens) // K
    halves = {block < n_blocks // 2 for block in text.told}
    assert halves == {True, False}
    assert len(text.told) < n_blocks / 2


@settings(max_examples=20)
@given(st.integers(0, 1000), st.sampled_from([8, 16, 64]))
def test_blocks_follow_the_block_size(number, size):
    texts = LensTexts(TOKENIZER, PROSE, block_size=size)
    text, fine = texts.draw(number, 300, 6), LensTexts(TOKENIZER, PROSE, block_size=1)
    exact = fine.draw(number, 300, 6)
    assert torch.equal(text.tokens, exact.tokens)
    assert set(text.told) == {token // size for token in exact.told}
    for ask, tokens in zip(text.asks, exact.asks, strict=True):
        assert set(ask.evidence) == {token // size for token in tokens.evidence}


def test_every_kind_of_question_comes_up():
    families = {ask.family for number in range(60) for ask in TEXTS.draw(number, 64, 16).asks}
    assert families >= {
        "attribute", "code", "codes", "correction", "hiding", "holder", "qa1", "qa2.1", "qa2.2",
        "qa3.1", "qa3.2", "qa5", "synonym", "unknown",
    }  # fmt: skip
