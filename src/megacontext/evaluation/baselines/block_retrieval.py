"""What retrieving rivals share: blocks found, raw in the prompt, before the newest tokens."""

from __future__ import annotations

import math
from abc import abstractmethod

from megacontext.evaluation.baselines.raw_rival import RawRival
from megacontext.evaluation.baselines.rival import Span
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel


class BlockRetrieval(RawRival):
    """Reads the blocks that match best, with their neighbours, in the order of the history.

    The budget is spent in full: blocks in order of relevance, each hit followed by its neighbours,
    as long as whole blocks fit beside the share of the newest tokens; these get the rest. Small
    models are easily distracted, and may answer better from less: see ``most_hits``.

    Args:
        base: the frozen base model.
        memory: where the tokens lie.
        budget: most tokens of context, prompt and answer together.
        recent_share: of the room, what is kept for the newest tokens; above 0, since what comes
            next follows them.
        neighbours: how many blocks on each side of a hit are read with it.
        query_tokens: how many of the newest tokens ask, where nothing else does.
        most_hits: most hits that are read, the budget not spent in full; ``None``: all that fit.
        most_recent: most of the newest tokens; ``None``: all that fit.
        name: in tables; that of the class if empty.
    """

    def __init__(
        self,
        base: BaseModel,
        memory: Memory,
        budget: int,
        *,
        recent_share: float = 0.25,
        neighbours: int = 1,
        query_tokens: int = 64,
        most_hits: int | None = None,
        most_recent: int | None = None,
        name: str = "",
    ) -> None:
        super().__init__(base, memory, budget)
        self.name = name or self.name
        self.recent_share = recent_share
        self.neighbours = neighbours
        self.query_tokens = query_tokens
        self.most_hits = most_hits
        self.most_recent = most_recent

    @abstractmethod
    def rank(self, cursor: int, n_blocks: int, limit: int, query: str) -> list[int]:
        """The most relevant of the blocks ``[0, n_blocks)``, best first.

        Args:
            cursor: end of the history that is known.
            n_blocks: 1 or more.
            limit: most blocks to return, 1 or more.
            query: what is asked; empty: see :meth:`query_text`.
        """

    def spans(self, cursor: int, room: int, query: str) -> list[Span]:
        """Blocks and newest tokens; the whole history where it fits."""
        if cursor <= room and self.most_hits is None:
            return [(0, cursor)]
        size = self.memory.identity.block_size
        most = min(cursor, room if self.most_recent is None else self.most_recent)
        recent = min(math.ceil(room * self.recent_share), most)
        n_blocks, places = (cursor - recent) // size, (room - recent) // size
        blocks: list[int] = []
        if n_blocks and places:
            hits = self.rank(cursor, n_blocks, min(places, self.most_hits or places), query)
            blocks = self._with_neighbours(hits, n_blocks)[:places]
        newest = min(room - len(blocks) * size, most)
        found = [(block * size, (block + 1) * size) for block in blocks]
        return [*found, (cursor - newest, cursor)]

    def query_text(self, cursor: int, query: str) -> str:
        """What is asked: ``query``, or the newest tokens before ``cursor`` where it is empty."""
        if query:
            return query
        return self.base.decode(self.memory.tokens(max(0, cursor - self.query_tokens), cursor))

    def _with_neighbours(self, hits: list[int], n_blocks: int) -> list[int]:
        """Each block once; a statement that crosses a border more often goes on behind it."""
        around = [0, *(s * d for d in range(1, self.neighbours + 1) for s in (1, -1))]
        wanted = (hit + offset for hit in hits for offset in around)
        return list(dict.fromkeys(block for block in wanted if 0 <= block < n_blocks))
