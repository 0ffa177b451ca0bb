"""The plainest rival: the same budget spent on the newest raw tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from megacontext.errors import InputError
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.plain_decode import decode_plain, raw_context
from megacontext.runtime.sampling import TokenSampler


class SlidingWindow:
    """A base model that sees only the newest tokens of a history.

    Args:
        base: the frozen base model.
        memory: where the tokens lie; gists are not used.
        budget: most tokens of context, prompt and answer together.
    """

    name = "window"

    def __init__(self, base: BaseModel, memory: Memory, budget: int) -> None:
        self.base = base
        self.memory = memory
        self.budget = budget

    def context(self, cursor: int, pending: Tensor, reserve: int) -> ContextInput:
        """The newest tokens before ``cursor`` and ``pending [p]``, with ``reserve`` kept free.

        Raises:
            InputError: prompt and reserve alone exceed the budget.
        """
        room = self.budget - len(pending) - reserve
        if room < 0:
            raise InputError(
                f"a prompt of {len(pending)} tokens and {reserve} to come do not fit into "
                f"{self.budget}; shorten them or raise the budget"
            )
        tokens = self.memory.tokens(max(0, cursor - room), cursor).long()
        ids = torch.cat((tokens, pending))
        return raw_context(self.base, ids)

    def nll(self, cursor: int, targets: Tensor) -> Tensor:
        """NLL in nats, ``[h]`` float32, of the tokens that follow ``cursor``."""
        nothing = torch.empty(0, dtype=torch.int64)
        return self.base.nll(self.context(cursor, nothing, len(targets)), targets)

    def ask(self, prompt: str, *, max_new_tokens: int, stop: str) -> str:
        """The answer to a prompt after the whole history, up to ``stop``."""
        pending = self.base.encode(prompt)
        reading = self.context(self.memory.n_tokens, pending, max_new_tokens)
        tokens = decode_plain(
            self.base,
            self.base.prefill(reading, keep=1),
            pending,
            TokenSampler(self.base.generation_config),
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        return "".join(token.text for token in tokens)
