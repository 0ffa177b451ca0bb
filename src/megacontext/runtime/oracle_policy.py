"""Counterfactual focus: measures with the base itself what every candidate is worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megacontext.runtime.focus_allocator import FocusAllocator
from megacontext.runtime.focus_policies import FocusView, LexicalPolicy, proposals_to_scores
from megacontext.runtime.focus_scores import AllocatorState, FocusScores
from megacontext.runtime.working_context import WorkingContext


class OraclePolicy:
    """Knows the tokens to come and tries every candidate; an upper bound, for evaluation only.

    The utility of a block is the summed NLL of the coming tokens without it less that with it, in
    nats. Candidates are the hinted blocks and what BM25 finds for the query and for the tokens to
    come.

    Args:
        future: ``[h]`` int64, the tokens to come after history and pending tokens.
        hints: blocks known to matter, for example those that hold the evidence.
        proposals: most blocks that BM25 adds to the candidates.
    """

    name = "oracle"

    def __init__(self, future: Tensor, hints: Sequence[int] = (), proposals: int = 8) -> None:
        self.future = future
        self.hints = tuple(hints)
        self._lexical = LexicalPolicy(proposals=proposals)
        self._allocator = FocusAllocator()

    def score(self, view: FocusView) -> FocusScores:
        """Measured utilities of all candidates, raw ones included."""
        context = view.context
        found, _ = self._lexical.search(view)
        n_old = context.raw_start // context.block_size
        hints = torch.tensor([b for b in self.hints if 0 <= b < n_old], dtype=torch.int64)
        blocks = torch.unique(torch.cat((found, hints)))
        if not len(blocks):
            return proposals_to_scores(context, blocks, torch.empty(0))
        now = self._nll(view, context, None)
        utility = torch.stack([self._gain(view, int(block), now) for block in blocks])
        return proposals_to_scores(context, blocks, utility)

    def _gain(self, view: FocusView, block: int, now: Tensor) -> Tensor:
        """What having the block raw is worth; for a block that is raw, what it would lose."""
        context, token = view.context, block * view.context.block_size
        entry = context.index_of(token)
        if int(context.levels[entry]) > 0:
            return now - self._nll(view, context.reveal(block), token)
        without = context.collapse(entry)
        return self._nll(view, without, None) - self._nll(view, context, token)

    def _nll(self, view: FocusView, context: WorkingContext, kept: int | None) -> Tensor:
        """Summed NLL of the coming tokens; room is made last with the entry over token ``kept``."""
        nothing = torch.empty(0)
        worth = torch.zeros(len(context))
        if kept is not None:
            worth[context.index_of(kept)] = 1e6
        scores = FocusScores(nothing.long(), nothing, worth, torch.zeros(len(context)))
        reserve = len(view.pending) + len(self.future)
        plan = self._allocator.make_room(context, scores, AllocatorState.initial(), reserve)
        reading = view.reader.read(plan.context, view.pending, ahead=len(self.future))
        return view.base.nll(reading, self.future).sum().cpu()
