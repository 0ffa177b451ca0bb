"""Texts for the harness's tasks in ``lm_eval_tasks``, made from the bundled book, which no bundled
model was trained on.
"""

from __future__ import annotations

import random
from typing import Any

from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.tasks.fact_themes import FactThemes
from megacontext.tasks.planting import plant

_CHOICES = 4


def recall_documents(
    count: int = 32, characters: int = 16_000, seed: int = 0
) -> list[dict[str, Any]]:
    """Excerpts of the book, each with one planted fact and the question for it.

    Args:
        count: excerpts, one behind the other; the book is begun anew where it ends.
        characters: of an excerpt.
        seed: of facts, places and choices.

    Returns:
        ``text``, ``question``, ``answer``, ``choices`` (the answer and those of other excerpts,
        of the same kind where there are enough) and ``label``, the answer's place among them.
    """
    rng = random.Random(seed)
    theme = FactThemes(rng, "held_out").plain(count)
    found: list[dict[str, Any]] = []
    for statement, question, text in zip(
        theme.statements, theme.questions, _excerpts(count, characters), strict=True
    ):
        one = type(theme)([statement], [question])
        planted, _ = plant(text, one, rng)
        wrong = sorted({q.answer for q in theme.questions} - {question.answer})
        rng.shuffle(wrong)
        same = {q.answer for q in theme.questions if q.family == question.family}
        wrong.sort(key=lambda answer, same=same: answer not in same)
        choices = [question.answer, *wrong[: _CHOICES - 1]]
        rng.shuffle(choices)
        found.append(
            {
                "text": planted,
                "question": question.text,
                "answer": question.answer,
                "choices": choices,
                "label": choices.index(question.answer),
            }
        )
    return found


def recall(**_: Any) -> Any:
    """:func:`recall_documents` as the harness wants them."""
    return _test_split(recall_documents())


def prose(**_: Any) -> Any:
    """Eight excerpts of the book as they stand, under ``text``."""
    return _test_split([{"text": text} for text in _excerpts(8, 6_000)])


def _excerpts(count: int, characters: int) -> list[str]:
    book = read_book(DemoConfig())
    starts = [index * characters % (len(book) - characters) for index in range(count)]
    return [book[start : start + characters] for start in starts]


def _test_split(documents: list[dict[str, Any]]) -> Any:
    # Here, since nothing else in this package needs it.
    from datasets import Dataset, DatasetDict

    return DatasetDict({"test": Dataset.from_list(documents)})
