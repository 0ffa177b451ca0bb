"""Turns a working context into what the base model reads."""

from __future__ import annotations

import torch
from torch import Tensor

from megacontext.gistnet import GistNet
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.row_layout import RowLayout
from megacontext.runtime.working_context import PositionPolicy, WorkingContext, node_keys


class ContextReader:
    """Reads raw tokens and gists from a memory and lays them out for the base model.

    Args:
        base: the frozen base model.
        gistnet: its reader decides whether gists become rows or bring keys and values along.
        memory: where tokens and gists lie.
        positions: see :meth:`WorkingContext.positions`.
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
        rows, gists = self.split(self.layout(context, len(pending), ahead=ahead))
        embeddings = self.embed(rows, context, pending)
        positions = rows.positions.to(device)
        if not len(gists):
            return ContextInput(embeddings=embeddings, positions=positions)
        keys, values = self.gist_entries(gists, context)
        return ContextInput(
            embeddings=embeddings,
            positions=positions,
            gist_keys=keys,
            gist_values=values,
            gist_positions=gists.positions.to(device),
        )

    def layout(self, context: WorkingContext, n_pending: int, *, ahead: int = 0) -> RowLayout:
        """Where everything of :meth:`read` stands; the same arguments and errors."""
        return RowLayout.of(
            context, n_pending, self.positions, self.max_positions - n_pending - ahead
        )

    def split(self, layout: RowLayout) -> tuple[RowLayout, RowLayout]:
        """What the base computes, and the gists that bring keys and values along."""
        apart = layout.levels > 0
        if self.gistnet.config.reader != "kv":
            apart = torch.zeros_like(apart)
        return layout[~apart], layout[apart]

    @torch.inference_mode()
    def embed(self, rows: RowLayout, context: WorkingContext, pending: Tensor) -> Tensor:
        """Input embeddings ``[rows, d_model]`` of rows of a context, in the order of positions.

        Args:
            rows: any of those of :meth:`layout`.
            context: what they are rows of.
            pending: ``[p]`` int64, tokens behind its cursor.
        """
        cursor = context.cursor
        is_gist = rows.levels > 0
        tokens = rows.starts[~is_gist]
        known = self.memory.tokens_at(tokens[tokens < cursor]).long()
        raw = self.base.embed(torch.cat((known, pending.long()[tokens[tokens >= cursor] - cursor])))
        if not bool(is_gist.any()):
            return raw
        gists = rows[is_gist]
        keys, which = torch.unique_consecutive(
            node_keys(gists.levels, gists.starts), return_inverse=True
        )
        first = torch.searchsorted(which, torch.arange(len(keys)))
        levels = gists.levels[first]
        vectors = self._gists(levels, gists.starts[first], context.block_size).to(self.base.device)
        read = self.gistnet.read_embeddings(vectors, levels.to(self.base.device), context.gist_cost)
        embeddings = raw.new_empty(len(rows), self.base.d_model)
        embeddings[~is_gist] = raw
        embeddings[is_gist] = read[which, gists.slots].to(embeddings.dtype)
        return embeddings

    @torch.inference_mode()
    def gist_entries(self, gists: RowLayout, context: WorkingContext) -> tuple[Tensor, Tensor]:
        """Keys and values of whole gists, for a ``kv`` reader.

        Args:
            gists: rows of :meth:`layout`, for every gist all its slots.
            context: what they are rows of.

        Returns:
            Keys ``[layers, gists, kv_heads, head_dim]``, not rotated, and values ``[layers, gists,
            kv_heads, value_dim]``, in the dtype of the base.
        """
        whole = gists[gists.slots == 0]
        vectors = self._gists(whole.levels, whole.starts, context.block_size)
        keys, values = self.gistnet.read_kv(
            vectors.to(self.base.device), whole.levels.to(self.base.device), context.gist_cost
        )
        dtype = self.base.dtype
        return keys.flatten(1, 2).to(dtype), values.flatten(1, 2).to(dtype)

    def gists(self, context: WorkingContext) -> Tensor:
        """``[g, gist_width]`` float32: the gists among the entries, oldest first."""
        chosen = context.levels > 0
        return self._gists(context.levels[chosen], context.starts[chosen], context.block_size)

    def _gists(self, levels: Tensor, starts: Tensor, block_size: int) -> Tensor:
        gists = torch.empty(len(levels), self.memory.identity.gist_width)
        for level in torch.unique(levels).tolist():
            here = levels == level
            gists[here] = self.memory.gists_at(level, starts[here] // block_size**level)
        return gists
