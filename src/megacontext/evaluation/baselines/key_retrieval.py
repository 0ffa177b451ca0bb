"""What rivals share that find blocks by the base model's own keys."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from megacontext.errors import ConfigError
from megacontext.evaluation.baselines.attention_probe import queries_and_keys
from megacontext.evaluation.baselines.block_retrieval import BlockRetrieval
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel


class KeyRetrieval(BlockRetrieval):
    """Reads the history once for its keys, and every question for its queries.

    The history is read in windows: half a budget of new tokens behind half a budget of older ones.
    What is kept of the keys is made on first use and stays for as long as this object lives; a
    memory that has grown adds its new blocks.

    Args:
        base: the frozen base model.
        memory: where the tokens lie.
        budget: most tokens of context, prompt and answer together.
        layers: layers to compare; all if empty.
        habits: of :class:`BlockRetrieval`.

    Raises:
        ConfigError: there is no such layer, or the budget is smaller than two blocks.
    """

    def __init__(
        self,
        base: BaseModel,
        memory: Memory,
        budget: int,
        *,
        layers: tuple[int, ...] = (),
        **habits: Any,
    ) -> None:
        super().__init__(base, memory, budget, **habits)
        wrong = [layer for layer in layers if not 0 <= layer < base.n_layers]
        if wrong:
            raise ConfigError(f"key_layers has {wrong[0]}; {base.name} has {base.n_layers} layers")
        size = memory.identity.block_size
        if budget < 2 * size:
            raise ConfigError(f"budget {budget} is less than two blocks of {size} tokens; raise it")
        self.layers = list(layers) or list(range(base.n_layers))
        self._stride = budget // 2 // size
        self._parts: list[Tensor] = []

    @abstractmethod
    def summarize(self, queries: Tensor, keys: Tensor, new: int) -> Tensor:
        """What is kept of a window's last ``new`` blocks: ``[new, layers, kv_heads, …]``.

        Args:
            queries: float32 ``[layers, tokens, kv_heads, heads per key, head_dim]``.
            keys: float32 ``[layers, tokens, kv_heads, head_dim]``.
            new: blocks at the end of the window.
        """

    def parts(self) -> list[Tensor]:
        """What is kept of all complete blocks, float16, as consecutive tensors."""
        total = self.memory.count(1)
        known = sum(map(len, self._parts))
        # A last stride that was not complete is read anew once the memory has grown, so that the
        # keys do not depend on when they were asked for.
        if known < total and known % self._stride:
            known -= len(self._parts.pop())
        for first in range(known, total, self._stride):
            self._parts.append(self._read(first, min(total, first + self._stride)))
        return self._parts

    def asked(self, cursor: int, query: str) -> Tensor:
        """Queries of the question, read behind the newest tokens, or of these where it is empty.

        Returns:
            float32 ``[layers, tokens, kv_heads, heads per key, head_dim]``.
        """
        question = self.base.encode(query)
        before = self.memory.tokens(max(0, cursor - self.budget // 2), cursor).long()
        ids = torch.cat((before, question))[-self.budget :]
        asking = min(len(ids), len(question) or self.query_tokens)
        return self._attention(ids)[0][:, -asking:]

    def _read(self, first: int, last: int) -> Tensor:
        size = self.memory.identity.block_size
        begin = max(0, first - self._stride) * size
        queries, keys = self._attention(self.memory.tokens(begin, last * size).long())
        return self.summarize(queries, keys, last - first).to(torch.float16)

    def _attention(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys = (
            part[self.layers].float().cpu() for part in queries_and_keys(self.base, ids)
        )
        return queries.unflatten(2, (self.base.n_kv_heads, -1)), keys
