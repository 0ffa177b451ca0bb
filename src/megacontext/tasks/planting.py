"""Plants facts into running text at known places."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from megacontext.errors import InputError
from megacontext.tasks.documents import Theme

_GAP = re.compile(r"(?<=[a-z][.!?]) (?=[A-Z])")


@dataclass(frozen=True)
class PlantedFact:
    """A statement inside a longer text, and what is asked about it.

    Attributes:
        statement: the planted sentence.
        question: the question.
        answer: the expected answer.
        family: kind of fact.
        character: index of the statement's first character in the planted text.
    """

    statement: str
    question: str
    answer: str
    family: str
    character: int


def plant(
    text: str, theme: Theme, rng: random.Random, *, last_share: float = 0.9
) -> tuple[str, list[PlantedFact]]:
    """Puts statement i of a theme between two sentences of a text, evenly spread and in order.

    Args:
        text: running text.
        theme: statements and questions in the same order, one question a statement.
        rng: moves every statement within its stretch of the text.
        last_share: no statement lies behind this share of the text.

    Returns:
        The new text and the facts with their places in it.

    Raises:
        InputError: the text has too few sentences.
    """
    gaps = [match.start() for match in _GAP.finditer(text)]
    gaps = [gap for gap in gaps if gap < len(text) * last_share]
    count = len(theme.statements)
    if len(gaps) < count:
        raise InputError(
            f"the text has room for {len(gaps)} facts, not for {count}; use a longer one"
        )
    parts: list[str] = []
    facts: list[PlantedFact] = []
    done = length = 0
    for index, (statement, question) in enumerate(
        zip(theme.statements, theme.questions, strict=True)
    ):
        low, high = index * len(gaps) // count, (index + 1) * len(gaps) // count
        gap = gaps[rng.randrange(low, high)]
        parts += [text[done:gap], " "]
        length += gap - done + 1
        facts.append(
            PlantedFact(statement, question.text, question.answer, question.family, length)
        )
        parts.append(statement)
        length += len(statement)
        done = gap
    parts.append(text[done:])
    return "".join(parts), facts
