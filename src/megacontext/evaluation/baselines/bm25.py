"""BM25 and raw blocks in the prompt: what a user without vectors would build."""

from __future__ import annotations

from megacontext.evaluation.baselines.block_retrieval import BlockRetrieval


class BM25Retrieval(BlockRetrieval):
    """Finds blocks by the words of the question, in the index that the memory keeps anyway."""

    name = "bm25"

    def rank(self, cursor: int, n_blocks: int, limit: int, query: str) -> list[int]:
        """The blocks with the highest BM25 score."""
        text = self.query_text(cursor, query)
        asked = limit
        while True:
            # Hits behind the old part of the history, or in its future, do not count.
            found, _ = self.memory.search_blocks(text, asked)
            old = found[found < n_blocks][:limit]
            if len(old) == limit or len(found) < asked:
                return old.tolist()
            asked *= 4
