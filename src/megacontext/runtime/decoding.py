"""One answer while it is decoded: which token comes next, and when the focus looks again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from megacontext.runtime.answer import Answer, DecodedToken, Looks
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.focus_scores import AllocatorState
from megacontext.runtime.reading import Reading
from megacontext.runtime.sampling import TokenSampler
from megacontext.runtime.working_context import WorkingContext


@dataclass(eq=False)
class Decoding:
    """The state of an answer between its tokens, whoever computes the logits.

    Each token takes logits of what follows: where the answer is :attr:`due`, those of a window read
    after the focus has looked again; else those behind the newest token.

    Attributes:
        base: its tokenizer says when to look again.
        answer: prompt and answer so far.
        reading: what the base has read for it.
        sampler: chooses the tokens.
        looks: what the focus looks for, and behind which text it does so again.
        max_new_tokens: most tokens.
        block_size: ``K``, tokens after which the focus looks again in any case.
        start: place of the first prompt token in the stream.
        remember: whether prompt and answer become part of the memory.
        mark: where the focus stood before.
        started: ``time.perf_counter()`` at the beginning.
        ended: whether the answer is complete.
    """

    base: BaseModel
    answer: Answer
    reading: Reading
    sampler: TokenSampler
    looks: Looks
    max_new_tokens: int
    block_size: int
    start: int
    remember: bool
    mark: tuple[WorkingContext, AllocatorState]
    started: float = field(default_factory=time.perf_counter)
    ended: bool = False

    def __post_init__(self) -> None:
        self.n_prompt = len(self.answer.said)
        self._count = 0
        self._again = False

    @property
    def due(self) -> bool:
        """Whether the focus looks again before the next token."""
        return self.fresh or self._count % self.block_size == 0

    @property
    def fresh(self) -> bool:
        """Whether it then looks for something new: at first, and behind a note."""
        return self._again or not self._count

    @property
    def said(self) -> Tensor:
        """``[a]`` int64: the answer so far, without the prompt."""
        return self.answer.said[self.n_prompt :]

    def step(self) -> Tensor:
        """Reads the newest token; logits ``[vocab]`` of the next one."""
        return self.reading.step(self.answer.said[-1:])

    def take(self, logits: Tensor, round_: int) -> Iterator[DecodedToken]:
        """Chooses the next token and gives out what is known to belong to the answer.

        Args:
            logits: ``[vocab]`` of the next token.
            round_: the refocus whose working context they come from.
        """
        token = self.sampler.choose(logits, self.answer.said)
        if self.sampler.is_end(token):
            self.ended = True
        else:
            yield from self.answer.push(token, round_)
            self._count += 1
            self.ended = self.answer.stopped or self._count == self.max_new_tokens
            self._again = not self.ended and self.looks.after(self.base, self.said)
        if self.ended and not self.answer.stopped:
            yield from self.answer.finish()
