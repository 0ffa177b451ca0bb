"""Rivals that spend their whole budget on raw tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from megacontext.errors import ConfigError, InputError
from megacontext.evaluation.baselines.rival import Span, joined
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.plain_decode import decode_plain, raw_context
from megacontext.runtime.sampling import TokenSampler


class RawRival(ABC):
    """Reads spans of the history, oldest first, as if they were one text, and then the prompt.

    Args:
        base: the frozen base model.
        memory: where the tokens lie.
        budget: most tokens of context, prompt and answer together.

    Raises:
        ConfigError: the base has fewer positions than the budget.
    """

    name: str

    def __init__(self, base: BaseModel, memory: Memory, budget: int) -> None:
        if budget > base.max_positions:
            raise ConfigError(
                f"budget {budget} is more than the {base.max_positions} positions of {base.name}; "
                "lower it"
            )
        self.base = base
        self.memory = memory
        self.budget = budget
        self.raw_spans: list[Span] = []

    @abstractmethod
    def spans(self, cursor: int, room: int, query: str) -> list[Span]:
        """Spans within ``[0, cursor)`` of at most ``room`` tokens together.

        Args:
            cursor: end of the history that is known.
            room: tokens, 0 or more.
            query: what is asked; the newest tokens ask where it is empty.
        """

    def context(self, cursor: int, pending: Tensor, reserve: int, query: str = "") -> ContextInput:
        """What the base reads: spans of ``[0, cursor)`` and ``pending [p]``.

        ``reserve`` tokens of the budget stay free.

        Raises:
            InputError: prompt and reserve alone exceed the budget.
        """
        room = self.budget - len(pending) - reserve
        if room < 0:
            raise InputError(
                f"a prompt of {len(pending)} tokens and {reserve} to come do not fit into "
                f"{self.budget}; shorten them or raise the budget"
            )
        self.raw_spans = joined(self.spans(cursor, room, query))
        parts = [self.memory.tokens(start, end).long() for start, end in self.raw_spans]
        return raw_context(self.base, torch.cat((*parts, pending)))

    def nll(self, cursor: int, targets: Tensor) -> Tensor:
        """NLL in nats, ``[h]`` float32, of the tokens that follow ``cursor``."""
        nothing = torch.empty(0, dtype=torch.int64)
        return self.base.nll(self.context(cursor, nothing, len(targets)), targets)

    def answer(self, prompt: str, question: str, *, max_new_tokens: int, stop: str = "\n") -> str:
        """The answer to a prompt after the whole history, up to ``stop``."""
        pending = self.base.encode(prompt)
        reading = self.context(self.memory.n_tokens, pending, max_new_tokens, question)
        tokens = decode_plain(
            self.base,
            self.base.prefill(reading, keep=1),
            pending,
            TokenSampler(self.base.generation_config),
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        return "".join(token.text for token in tokens)
