"""Block retrieval by representative keys, as InfLLM does it (arXiv 2402.04617)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megacontext.evaluation.baselines.key_retrieval import KeyRetrieval
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel

# How many following tokens say which tokens of a block matter.
_LOCAL_TOKENS = 64


class InfLLMRetrieval(KeyRetrieval):
    """Finds blocks by the products of a few of their keys with the question's queries.

    A block is represented, in every layer and head, by those of its tokens whose products with the
    queries of the tokens after them are largest; its relevance is the sum of products between these
    tokens' keys and the question's queries, all as if at one distance. Where InfLLM lets every
    layer load blocks of its own, the base reads one prompt here: the layers' relevances, each
    brought to mean 0 and variance 1 over the blocks, are added up. Since a sum of products is the
    product of sums, one vector a block, layer and head is kept.

    Args:
        base: the frozen base model.
        memory: where the tokens lie.
        budget: most tokens of context, prompt and answer together.
        key_tokens: tokens that represent a block.
        habits: of :class:`KeyRetrieval`.
    """

    name = "infllm"

    def __init__(
        self, base: BaseModel, memory: Memory, budget: int, *, key_tokens: int = 4, **habits: Any
    ) -> None:
        super().__init__(base, memory, budget, **habits)
        self.key_tokens = key_tokens

    def rank(self, cursor: int, n_blocks: int, limit: int, query: str) -> list[int]:
        """The blocks with the highest relevance."""
        kept = torch.cat(self.parts())[:n_blocks].float()
        asked = self.asked(cursor, query).sum(dim=3).mean(dim=1)
        relevance = torch.einsum("lgd,blgd->lb", asked, kept)
        centred = relevance - relevance.mean(dim=1, keepdim=True)
        spread = centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
        total = (centred / spread).sum(dim=0)
        return torch.topk(total, min(limit, n_blocks)).indices.tolist()

    def summarize(self, queries: Tensor, keys: Tensor, new: int) -> Tensor:
        """Sums of the representative keys: ``[new, layers, kv_heads, head_dim]``."""
        size = self.memory.identity.block_size
        weight = (_mean_of_next(queries.sum(dim=3), _LOCAL_TOKENS) * keys).sum(dim=-1)
        # [layers, blocks, tokens of a block, heads, …]
        weight, keys = (x[:, -new * size :].unflatten(1, (new, size)) for x in (weight, keys))
        best = weight.topk(min(self.key_tokens, size), dim=2).indices
        chosen = keys.gather(2, best[..., None].expand(*best.shape, keys.shape[-1]))
        return chosen.sum(dim=2).transpose(0, 1)


def _mean_of_next(queries: Tensor, count: int) -> Tensor:
    """At each token, the mean over it and the next ``count``: ``[layers, n, heads, dim]``."""
    n = queries.shape[1]
    sums = torch.cat((torch.zeros_like(queries[:, :1]), queries.cumsum(dim=1)), dim=1)
    here = torch.arange(n)
    end = (here + 1 + count).clamp(max=n)
    return (sums[:, end] - sums[:, here]) / (end - here)[:, None, None]
