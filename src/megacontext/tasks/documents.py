"""A generated training text: pieces in order, each with the loss weight of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

PieceKind = Literal["prose", "statement", "question", "answer", "copy"]

QUESTION_TEMPLATE = "\nQuestion: {question}\nAnswer:"


@dataclass(frozen=True)
class Piece:
    """Text with the kind that decides how much its tokens weigh in the loss.

    Args:
        text: the text.
        kind: what it is.
        family: of an answer, the kind of question.
        mark: of a statement, its number in the document; of an answer, that of the newest statement
            it needs; -1 where there is none.
    """

    text: str
    kind: PieceKind
    family: str = ""
    mark: int = -1


@dataclass(frozen=True)
class Question:
    """A question about a theme.

    Args:
        text: the question.
        answer: the expected answer.
        after: how many statements of the theme must have been read before.
        family: the kind of question, for reports.
        lasting: whether the answer stays right whatever the theme says later.
    """

    text: str
    answer: str
    after: int
    family: str
    lasting: bool = True

    def pieces(self, mark: int = -1) -> list[Piece]:
        """The question as the model reads it and the answer as it shall write it."""
        return [
            Piece(QUESTION_TEMPLATE.format(question=self.text), "question"),
            Piece(f" {self.answer}\n", "answer", self.family, mark),
        ]


@dataclass(frozen=True)
class Theme:
    """Statements that belong together, in order, and the questions they allow."""

    statements: list[str]
    questions: list[Question] = field(default_factory=list)
