"""A generated training text: pieces in order, each with the loss weight of its tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

# Relation, entity and value: what holds in a simulated world right after a statement,
# though the statement does not say it.
WorldFact = tuple[str, str, str]
RELATIONS = ("where", "before", "from", "holder", "carries", "giver", "taker", "gave", "received")

PieceKind = Literal["prose", "statement", "question", "answer", "copy"]

QUESTION_TEMPLATE = "\nQuestion: {question}\nAnswer:"

# Between notes and the answer they lead to. Words of notes have a space before them, as in stories:
# to a byte-level tokenizer, and so to a model that copies, a name without it is another word.
CONCLUSION = " So:"


@dataclass(frozen=True)
class Piece:
    """Text with the kind that decides how much its tokens weigh in the loss.

    Args:
        text: the text.
        kind: what it is.
        family: of an answer, the kind of question.
        mark: of a statement, its number in the document; of an answer, that of the newest statement
            it needs; -1 where there is none.
        facts: of a statement in a story, what holds after it of those it names; of a question,
            what has to be found out on the way.
    """

    text: str
    kind: PieceKind
    family: str = ""
    mark: int = -1
    facts: tuple[WorldFact, ...] = ()


@dataclass(frozen=True)
class Question:
    """A question about a theme.

    Args:
        text: the question.
        answer: the expected answer.
        after: how many statements of the theme must have been read before.
        family: the kind of question, for reports.
        lasting: whether the answer stays right whatever the theme says later.
        facts: what has to be found out on the way to the answer.
        notes: what the model shall write down on its way to the answer; empty where one look
            suffices (a scratchpad, arXiv 2112.00114).
        evidence: statements that have to be read, by index, in the order in which they are needed;
            empty where that is the newest of the first ``after`` alone, see :attr:`needed`.
    """

    text: str
    answer: str
    after: int
    family: str
    lasting: bool = True
    facts: tuple[WorldFact, ...] = ()
    notes: str = ""
    evidence: tuple[int, ...] = ()

    @property
    def needed(self) -> tuple[int, ...]:
        """Indices of the statements that have to be read; none where nothing answers."""
        return self.evidence or ((self.after - 1,) if self.after else ())

    def pieces(self, mark: int = -1) -> list[Piece]:
        """The question as the model reads it and the answer as it shall write it."""
        return [
            Piece(QUESTION_TEMPLATE.format(question=self.text), "question", facts=self.facts),
            Piece(f" {self.written}\n", "answer", self.family, mark),
        ]

    @property
    def written(self) -> str:
        """The answer as the model shall write it, after its notes."""
        return f"{self.notes}{CONCLUSION} {self.answer}" if self.notes else self.answer


def final_answer(written: str) -> str:
    """What a model answers, without the notes that it may have written before."""
    return written.rpartition(CONCLUSION)[2].strip()


@dataclass(frozen=True)
class Theme:
    """Statements that belong together, in order, and the questions they allow.

    Args:
        statements: the sentences.
        questions: what can be asked about them.
        facts: after each statement, what holds in the story's world of those it names and is not
            said in it; empty where there is no world.
    """

    statements: list[str]
    questions: list[Question] = field(default_factory=list)
    facts: list[tuple[WorldFact, ...]] = field(default_factory=list)
