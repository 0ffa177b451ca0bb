"""What a look has found, for the looks that follow it while nothing new is asked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megacontext.runtime.focus_scores import FocusScores
from megacontext.runtime.working_context import WorkingContext, node_keys


@dataclass(frozen=True, eq=False)
class HeldScores:
    """What one look found worth its detail, kept beyond the window that it was scored for.

    Attributes:
        context: the window that was scored.
        found: its scores.
    """

    context: WorkingContext
    found: FocusScores

    def scores(self, context: WorkingContext) -> FocusScores:
        """The same for the window of now: what is open stays, and nothing is asked for.

        Args:
            context: a window that came from the scored one by edits and by growing.

        Returns:
            Of every entry that was scored, its worth, or 0 where it was called harmful; of a block
            that was asked for and is raw now, what it was asked for; 0 for everything else.
        """
        keys, worth = self._worth()
        at = torch.searchsorted(keys, context.keys).clamp(max=max(0, len(keys) - 1))
        unknown = FocusScores.unknown(len(context))
        if not len(keys):
            return unknown
        held = torch.where(keys[at] == context.keys, worth[at], 0.0)
        return replace(unknown, entry_utility=held)

    def _worth(self) -> tuple[Tensor, Tensor]:
        """Spans by their keys, ascending, and the highest worth that was found for each."""
        context, found = self.context, self.found
        # To open a level-1 gist is to reveal its block.
        opened = (context.levels == 1) & (found.expand_utility > 0)
        blocks = torch.cat((found.proposal_blocks * context.block_size, context.starts[opened]))
        keys = torch.cat((context.keys, node_keys(torch.zeros_like(blocks), blocks)))
        worth = torch.cat(
            (found.entry_utility, found.proposal_utility, found.expand_utility[opened])
        )
        unique, place = torch.unique(keys, return_inverse=True)
        best = torch.zeros(len(unique)).scatter_reduce(0, place, worth.float(), "amax")
        return unique, best
