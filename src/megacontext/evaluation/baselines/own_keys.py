"""Block retrieval by the base model's own keys: exact attention, without positions."""

from __future__ import annotations

import torch
from torch import Tensor

from megacontext.evaluation.baselines.key_retrieval import KeyRetrieval


class OwnKeysRetrieval(KeyRetrieval):
    """Finds the blocks to which the question attends most, as if all were at one distance.

    The attention is exact: a softmax over the keys of every old token, per layer, head and token of
    the question; a block is worth the sum of what its tokens get. EM-LLM (arXiv 2407.09450) and
    InfLLM (2402.04617) approximate this by a few keys a block, which on a small base finds nothing;
    :class:`~megacontext.evaluation.baselines.infllm.InfLLMRetrieval` does as published. All keys
    are kept: 2 bytes for every layer compared, key/value head, key dimension and token.
    """

    name = "own_keys"

    def rank(self, cursor: int, n_blocks: int, limit: int, query: str) -> list[int]:
        """The blocks with the highest attention mass."""
        asked = self.asked(cursor, query)
        found: list[Tensor] = []
        known = 0
        for part in self.parts():
            if known >= n_blocks:
                break
            # [layers, kv_heads, heads per key, tokens of the question, blocks]
            logits = torch.einsum("lmghd,blgtd->lghmbt", asked, part.float())
            found.append(logits.logsumexp(dim=-1))
            known += len(part)
        mass = torch.cat(found, dim=-1)[..., :n_blocks].softmax(dim=-1)
        worth = mass.flatten(0, -2).sum(dim=0)
        return torch.topk(worth, min(limit, n_blocks)).indices.tolist()

    def summarize(self, queries: Tensor, keys: Tensor, new: int) -> Tensor:
        """All keys: ``[new, layers, kv_heads, tokens of a block, head_dim]``."""
        size = self.memory.identity.block_size
        return keys[:, -new * size :].unflatten(1, (new, size)).permute(1, 0, 3, 2, 4)
