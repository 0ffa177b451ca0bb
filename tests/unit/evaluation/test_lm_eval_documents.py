from __future__ import annotations

import pytest

from megacontext.evaluation.lm_eval_documents import recall_documents


@pytest.fixture(scope="module")
def documents():
    return recall_documents(count=24, characters=8_000, seed=3)


def test_every_excerpt_holds_its_answer_before_its_end(documents):
    assert len(documents) == 24
    for document in documents:
        assert 0 < document["text"].index(document["answer"]) < 0.95 * len(document["text"])
        assert 8_000 < len(document["text"]) < 8_300


def test_one_of_four_different_choices_is_right(documents):
    for document in documents:
        assert len(set(document["choices"])) == 4
        assert document["choices"][document["label"]] == document["answer"]
    assert len({document["label"] for document in documents}) == 4, "at any place"


def test_numbers_are_to_be_told_from_numbers(documents):
    numbers = [d for d in documents if d["answer"].isdigit()]
    assert len(numbers) == 12
    for document in numbers:
        assert all(choice.isdigit() for choice in document["choices"])


def test_a_seed_decides_everything(documents):
    assert recall_documents(count=24, characters=8_000, seed=3) == documents
    assert recall_documents(count=24, characters=8_000, seed=4) != documents


def test_the_excerpts_differ(documents):
    assert len({document["text"][:200] for document in documents}) == 24
