"""A question about a long history, with its evidence and the metric that marks an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megacontext.tasks.documents import QUESTION_TEMPLATE, final_answer

Metric = Literal["exact", "all_of", "babilong"]


@dataclass(frozen=True, eq=False)
class LongQuestion:
    """A history in tokens and one question about it; equal to itself alone.

    Attributes:
        task: what is tested, for example ``qa1`` or ``niah_single``.
        history: token ids, int64 ``[tokens]``.
        question: the question, bare.
        answers: what is expected; several only for ``all_of``.
        evidence: spans ``[start, end)`` of the tokens in ``history`` that the answer needs.
        metric: ``exact``: what is written is the one answer. ``all_of``: every answer occurs in
            what is written, in upper or lower case, anywhere (the string match of RULER, arXiv
            2404.06654; it averages :meth:`score`). ``babilong``: of the labels, those that the
            first written sentence names beyond the question are exactly those of the answer
            (BABILong, arXiv 2406.10149). Labels are found as whole words; its published script
            also finds them within words, such as ``one`` in ``none``.
        labels: for ``babilong``, the answers that the task's questions can have.
        max_new_tokens: most tokens an answer may take.
    """

    task: str
    history: Tensor
    question: str
    answers: tuple[str, ...]
    evidence: tuple[tuple[int, int], ...]
    metric: Metric
    labels: tuple[str, ...] = ()
    max_new_tokens: int = 48

    @property
    def prompt(self) -> str:
        """The question as the model reads it behind the history."""
        return QUESTION_TEMPLATE.format(question=self.question)

    def is_right(self, written: str) -> bool:
        """Whether what a model wrote, its notes left out, answers the question."""
        answer = final_answer(written)
        if self.metric == "exact":
            return answer == self.answers[0]
        if self.metric == "all_of":
            return self.score(written) == 1
        return self._names_the_target(answer)

    def score(self, written: str) -> float:
        """The share of the answers that is right, as RULER averages it; 0 or 1 if there is one."""
        if self.metric != "all_of":
            return float(self.is_right(written))
        answer = final_answer(written).lower()
        return sum(expected.lower() in answer for expected in self.answers) / len(self.answers)

    def _names_the_target(self, answer: str) -> bool:
        named = _named(_first_sentence(answer), self.labels)
        asked = _named(self.question.lower(), self.labels)
        target = {part for expected in self.answers for part in expected.lower().split(",")}
        return named - asked == target


def _first_sentence(text: str) -> str:
    """The first sentence or line, in lower case."""
    return re.split(r"[.\n]", text.strip().lower(), maxsplit=1)[0]


def _named(text: str, labels: tuple[str, ...]) -> set[str]:
    """The labels that occur in a lower-case text as whole words."""
    return {
        label
        for label in (label.lower() for label in labels)
        if re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text)
    }
