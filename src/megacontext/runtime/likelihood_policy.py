"""Focus without training: what BM25 finds, weighed by how likely it makes the question."""

from __future__ import annotations

import torch

from megacontext.lensnet.features import closeness
from megacontext.runtime.focus_policies import (
    FocusView,
    LexicalPolicy,
    proposals_to_scores,
    spread,
)
from megacontext.runtime.focus_scores import FocusScores
from megacontext.runtime.query_likelihood import QueryLikelihood


class LikelihoodPolicy:
    """BM25 proposes, and the base model's query likelihood decides; needs no training.

    Where nobody asks, it is BM25 alone.

    Args:
        proposals: most blocks that the base model reads with the question.
        nats_apart: a block's worth falls by e for so many nats that another makes the question
            likelier than it does.
        least_nats: a block that makes the question likelier by less is left out.
        relative_floor: what is worth less than this share of the best block is left out.
        neighbour_share: of a block's worth that the block before it and the one behind it get.
    """

    name = "likelihood"

    def __init__(
        self,
        *,
        proposals: int = 16,
        nats_apart: float = 4.0,
        least_nats: float = 4.0,
        relative_floor: float = 0.2,
        neighbour_share: tuple[float, float] = (0.5, 0.8),
    ) -> None:
        self.proposals = proposals
        self.nats_apart = nats_apart
        self.least_nats = least_nats
        self.relative_floor = relative_floor
        self.neighbour_share = neighbour_share
        self._likelihood = QueryLikelihood()
        self._lexical = LexicalPolicy()
        self._finder = LexicalPolicy(proposals=proposals, relative_floor=0.0)

    def score(self, view: FocusView) -> FocusScores:
        """Proposes the blocks that make the question likelier, and their neighbours."""
        if not view.asked or not len(view.context):
            return self._lexical.score(view)
        context = view.context
        blocks, _ = self._finder.search(view)
        blocks = blocks[blocks < context.raw_start // context.block_size][: self.proposals]
        if not len(blocks):
            return proposals_to_scores(context, blocks, torch.empty(0))
        gains = self._likelihood.gains(view, blocks)
        told = self._likelihood.told(view, blocks)
        known = torch.ones(1, len(blocks), dtype=torch.bool)
        worth = gains.masked_fill(gains < self.least_nats, 0.0)
        worth = worth * closeness(gains[None] / self.nats_apart, known, told[None])[0]
        kept = (worth > 0) & (
            worth >= self.relative_floor * float(worth.masked_fill(told, 0.0).max())
        )
        n_old = context.raw_start // context.block_size
        found, utility = spread(blocks[kept], worth[kept], self.neighbour_share, n_old)
        return proposals_to_scores(context, found, utility)
