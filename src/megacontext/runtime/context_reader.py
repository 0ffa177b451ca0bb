"""Turns a working context into what the base model reads."""

from __future__ import annotations

import torch
from torch import Tensor

from megacontext.gistnet import GistNet
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.working_context import PositionPolicy, WorkingContext


class ContextReader:
    """Reads raw tokens and gists from a memory and lays them out for the base model.

    Args:
        base: the frozen base model.
        gistnet: its reader decides whether gists become rows or bring keys and values along.
        memory: where tokens and gists lie.
        positions: ``packed`` or ``timeline``.
        max_positions: positions the base may use, from 0.
    """

    def __init__(
        self,
        base: BaseModel,
        gistnet: GistNet,
        memory: Memory,
        *,
        positions: PositionPolicy,
        max_positions: int,
    ) -> None:
        self.base = base
        self.gistnet = gistnet
        self.memory = memory
        self.positions: PositionPolicy = positions
        self.max_positions = max_positions

    @torch.inference_mode()
    def read(self, context: WorkingContext, pending: Tensor, *, ahead: int = 0) -> ContextInput:
        """The context followed by ``pending [p]``, raw token ids that are not in the memory yet.

        Args:
            context: what to read.
            pending: int64.
            ahead: positions to keep free for tokens that will be decoded behind them.

        Raises:
            ConfigError: all of that needs more positions than the base has.
        """
        device = self.base.device
        rows = torch.where(context.levels > 0, context.gist_cost, context.widths)
        entry = torch.repeat_interleave(rows)
        offset = torch.arange(len(entry)) - (rows.cumsum(0) - rows)[entry]
        starts = context.positions(self.positions, self.max_positions - len(pending) - ahead)
        positions = starts[entry] + offset
        is_gist = context.levels[entry] > 0
        tokens = self.memory.tokens(0, context.cursor)
        raw = tokens[(context.starts[entry] + offset)[~is_gist]].long()
        after = int(positions[-1]) + 1 if len(positions) else 0
        pending_positions = torch.arange(after, after + len(pending))
        raw_embeddings = self.base.embed(torch.cat((raw, pending.long())))
        gists = self.gists(context).to(device)
        gist_levels = context.levels[context.levels > 0].to(device)
        if self.gistnet.config.reader == "kv" and len(gists):
            keys, values = self.gistnet.read_kv(gists, gist_levels, context.gist_cost)
            return ContextInput(
                embeddings=raw_embeddings,
                positions=torch.cat((positions[~is_gist], pending_positions)).to(device),
                gist_keys=keys.flatten(1, 2).to(self.base.dtype),
                gist_values=values.flatten(1, 2).to(self.base.dtype),
                gist_positions=positions[is_gist].to(device),
            )
        embeddings = raw_embeddings.new_empty(len(entry) + len(pending), self.base.d_model)
        raw_rows = torch.cat((~is_gist, torch.ones(len(pending), dtype=torch.bool)))
        embeddings[raw_rows] = raw_embeddings
        if len(gists):
            read = self.gistnet.read_embeddings(gists, gist_levels, context.gist_cost)
            embeddings[~raw_rows] = read.flatten(0, 1).to(embeddings.dtype)
        return ContextInput(
            embeddings=embeddings,
            positions=torch.cat((positions, pending_positions)).to(device),
        )

    def gists(self, context: WorkingContext) -> Tensor:
        """``[g, gist_width]`` float32: the gists among the entries, oldest first."""
        chosen = context.levels > 0
        levels, starts = context.levels[chosen], context.starts[chosen]
        gists = torch.empty(len(levels), self.memory.identity.gist_width)
        for level in range(1, context.top_level + 1):
            here = levels == level
            if bool(here.any()):
                index = starts[here] // context.block_size**level
                gists[here] = self.memory.gists(level)[index].float()
        return gists
