"""What every rival can do: answer after a history, and predict what follows a part of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

Span = tuple[int, int]
"""Tokens ``[start, end)`` of the history."""


class Rival(Protocol):
    """One way to spend a working budget of ``W`` token-equivalents on a history.

    All rivals of a comparison share the frozen base model, the memory and the budget: what they
    read of the history, the prompt and what is still to come cost ``W`` together at most.
    """

    @property
    def name(self) -> str:
        """Name in tables."""
        ...

    @property
    def raw_spans(self) -> Sequence[Span]:
        """What was read raw when the last answer, or NLL, began: oldest first, disjoint."""
        ...

    def answer(self, prompt: str, question: str, *, max_new_tokens: int, stop: str = "\n") -> str:
        """The continuation of the whole history and the prompt, decoded as the model decodes.

        Args:
            prompt: what the base model reads behind the history.
            question: the bare question, for rivals that look something up.
            max_new_tokens: most tokens of the answer.
            stop: text that ends the answer and is not part of it.

        Raises:
            InputError: this rival cannot be asked here, for example because the history does not
                fit; the message says why.
        """
        ...

    def nll(self, cursor: int, targets: Tensor) -> Tensor:
        """Negative log-likelihood of tokens given the history before them.

        Args:
            cursor: only ``history[:cursor]`` is known.
            targets: int64 ``[h]``, the tokens behind it.

        Returns:
            ``[h]`` float32, in nats.

        Raises:
            InputError: as for :meth:`answer`.
        """
        ...


@runtime_checkable
class Informed(Protocol):
    """A rival that is told more than the others: an upper bound, not a competitor."""

    def inform(self, answer: str, evidence: Sequence[Span]) -> None:
        """Tells the right answer to the next question, and where its evidence lies."""
        ...


def joined(spans: Iterable[Span]) -> list[Span]:
    """The same tokens as few spans: oldest first, disjoint, not adjacent, not empty."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found
