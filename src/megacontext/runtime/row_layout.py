"""Which entry, token or slot every row of a reading stands for, and at which position."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megacontext.runtime.working_context import PositionPolicy, WorkingContext, node_keys


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Rows in the order of their positions: of raw tokens, and of gists, which have several.

    Attributes:
        levels: ``[m]`` int64, 0 for a raw token.
        starts: ``[m]`` int64, the token itself, or the first one of the gist's span.
        slots: ``[m]`` int64, which of its gist's rows this is; 0 for a raw token.
        positions: ``[m]`` int64, strictly increasing.
        block_size: ``K``, more than the slots of a gist.
    """

    levels: Tensor
    starts: Tensor
    slots: Tensor
    positions: Tensor
    block_size: int

    @classmethod
    def of(
        cls, context: WorkingContext, n_pending: int, policy: PositionPolicy, max_positions: int
    ) -> RowLayout:
        """The rows of a context, followed by tokens that are not part of it yet.

        Args:
            context: what is read.
            n_pending: tokens behind the cursor.
            policy: how positions follow from the entries.
            max_positions: positions that the rows of the context may use.

        Raises:
            ConfigError: the rows do not fit into ``max_positions``.
        """
        rows = torch.where(context.levels > 0, context.gist_cost, context.widths)
        entry = torch.repeat_interleave(rows)
        offset = torch.arange(len(entry)) - (rows.cumsum(0) - rows)[entry]
        positions = context.positions(policy, max_positions)[entry] + offset
        levels, starts = context.levels[entry], context.starts[entry]
        after = int(positions.max()) + 1 if len(positions) else 0
        pending = torch.arange(n_pending)
        nothing = torch.zeros_like(pending)
        layout = cls(
            levels=torch.cat((levels, nothing)),
            starts=torch.cat(
                (torch.where(levels > 0, starts, starts + offset), pending + context.cursor)
            ),
            slots=torch.cat((offset.masked_fill(levels == 0, 0), nothing)),
            positions=torch.cat((positions, pending + after)),
            block_size=context.block_size,
        )
        return layout[layout.positions.argsort()]

    @cached_property
    def ids(self) -> Tensor:
        """``[m]`` int64: what each row stands for, distinct; a raw token's is its place."""
        gists = -1 - (node_keys(self.levels, self.starts) * self.block_size + self.slots)
        return torch.where(self.levels > 0, gists, self.starts)

    def __getitem__(self, chosen: Tensor) -> RowLayout:
        """The rows at a mask or at indices ``chosen``."""
        return RowLayout(
            self.levels[chosen],
            self.starts[chosen],
            self.slots[chosen],
            self.positions[chosen],
            self.block_size,
        )

    def __len__(self) -> int:
        return self.levels.shape[0]
