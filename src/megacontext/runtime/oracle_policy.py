"""Counterfactual focus: measures with the base itself what every candidate is worth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megacontext.runtime.counterfactual import Counterfactual
from megacontext.runtime.focus_policies import FocusView, LexicalPolicy, proposals_to_scores
from megacontext.runtime.focus_scores import FocusScores


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

    def score(self, view: FocusView) -> FocusScores:
        """Measured utilities of all candidates, raw ones included."""
        context = view.context
        found, _ = self._lexical.search(view)
        n_old = context.raw_start // context.block_size
        hints = torch.tensor([b for b in self.hints if 0 <= b < n_old], dtype=torch.int64)
        blocks = torch.unique(torch.cat((found, hints)))
        if not len(blocks):
            return proposals_to_scores(context, blocks, torch.empty(0))
        utility = Counterfactual(view, self.future).blocks(blocks)
        return proposals_to_scores(context, blocks, utility)
