"""Windows in which some blocks are read as gists: which there are, and where everything lies.

All of it is index arithmetic on whole batches, for training and for measuring gists; the running
engine's window, which changes entry by entry, is the
:class:`~megacontext.runtime.working_context.WorkingContext`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain, combinations

import torch
from torch import Tensor

from megacontext.errors import InputError


def legal_windows(n_entries: int, width: int, align: int = 1) -> Tensor:
    """Every window of ``width`` neighbouring entries that begins at a multiple of ``align``.

    Returns:
        Int64 ``[windows, width]``, indices of entries; no window where ``width`` exceeds
        ``n_entries``.

    Raises:
        InputError: ``width`` or ``align`` is not positive.
    """
    if width < 1 or align < 1:
        raise InputError(f"width is {width} and align {align}, expected both at least 1")
    starts = torch.arange(0, n_entries - width + 1, align) if width <= n_entries else torch.empty(0)
    return starts.long()[:, None] + torch.arange(width)


def substitution_patterns(
    n_blocks: int,
    replaced: int,
    *,
    keep_last: int = 0,
    limit: int = 4096,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The ways of reading ``replaced`` of ``n_blocks`` blocks as level-1 gists.

    Args:
        n_blocks: blocks of the window.
        replaced: how many become gists.
        keep_last: blocks at the end that stay raw.
        limit: most patterns; where there are more, that many are drawn.
        generator: of the draw, with replacement between patterns.

    Returns:
        Int64 ``[patterns, n_blocks]``, the level each block is read at: 0 or 1. All patterns in
        lexicographic order of their replaced blocks, or a sample of them.

    Raises:
        InputError: not so many blocks may be replaced.
    """
    free = n_blocks - keep_last
    if not 0 <= replaced <= free or keep_last < 0:
        raise InputError(f"cannot replace {replaced} of {free} blocks ({keep_last} stay raw)")
    total = math.comb(free, replaced)
    if total <= limit:
        flat = torch.tensor(list(chain.from_iterable(combinations(range(free), replaced))))
        chosen = flat.long().reshape(total, replaced)
    else:
        keys = torch.rand(limit, free, generator=generator)
        chosen = keys.argsort(dim=1)[:, :replaced]
    levels = torch.zeros(len(chosen), n_blocks, dtype=torch.int64)
    return levels.scatter_(1, chosen, 1)


@dataclass(frozen=True, eq=False)
class WindowLayout:
    """Where the rows and gists of a batch of windows lie; made by :meth:`of`.

    Attributes:
        tokens: int64 ``[batch, raw]``, index into the window's tokens of every raw row.
        positions: int64 ``[batch, raw]``, packed positions of the raw rows.
        gists: int64 ``[batch, g]``, index of every gist among the window's gists: those of level 1
            first, then those of level 2, each in order.
        gist_levels: int64 ``[batch, g]``.
        gist_positions: int64 ``[batch, g * slots]``, packed positions of the gists' entries.
        seen: int64 ``[batch, raw]``, gists before each raw row.
        slots: entries that each gist is read as.
    """

    tokens: Tensor
    positions: Tensor
    gists: Tensor
    gist_levels: Tensor
    gist_positions: Tensor
    seen: Tensor
    slots: int

    @classmethod
    def of(cls, levels: Tensor, *, block_size: int, slots: int) -> WindowLayout:
        """Lays out windows.

        Args:
            levels: int64 ``[batch, blocks]``: 0 where a block is raw, 1 where it is read as its
                gist, 2 where the whole span of ``block_size`` blocks it lies in is one gist.
            block_size: tokens of a block.
            slots: entries of a gist, at most those its GistNet has.

        Raises:
            InputError: a level is none of these, a level-2 span is incomplete, or the windows of
                the batch differ in their number of raw blocks or gists.
        """
        _check_levels(levels, block_size)
        blocks = torch.arange(levels.shape[1], device=levels.device)
        raw = levels == 0
        starts_gist = (levels == 1) | ((levels == 2) & (blocks % block_size == 0))
        cost = torch.where(raw, block_size, 0) + torch.where(starts_gist, slots, 0)
        begin = cost.cumsum(dim=1) - cost
        raw_blocks = _where(raw, "raw blocks")
        gist_blocks = _where(starts_gist, "gists")
        inner = torch.arange(block_size, device=levels.device)
        gist_levels = levels.gather(1, gist_blocks)
        index = torch.where(
            gist_levels == 1, gist_blocks, levels.shape[1] + gist_blocks // block_size
        )
        seen = starts_gist.cumsum(dim=1).gather(1, raw_blocks)
        slot = torch.arange(slots, device=levels.device)
        return cls(
            tokens=(raw_blocks[..., None] * block_size + inner).flatten(1),
            positions=(begin.gather(1, raw_blocks)[..., None] + inner).flatten(1),
            gists=index,
            gist_levels=gist_levels,
            gist_positions=(begin.gather(1, gist_blocks)[..., None] + slot).flatten(1),
            seen=seen.repeat_interleave(block_size, dim=1),
            slots=slots,
        )

    @property
    def n_gists(self) -> int:
        """Gists in each window."""
        return self.gists.shape[1]


def _where(chosen: Tensor, what: str) -> Tensor:
    """Int64 ``[batch, count]``: the blocks that are chosen, in order."""
    counts = chosen.sum(dim=1)
    count = int(counts[0]) if len(counts) else 0
    if bool((counts != count).any()):
        raise InputError(f"the windows of a batch must have equally many {what}: {counts.tolist()}")
    order = torch.argsort((~chosen).to(torch.int8), dim=1, stable=True)
    return order[:, :count]


def _check_levels(levels: Tensor, block_size: int) -> None:
    if levels.ndim != 2 or bool(((levels < 0) | (levels > 2)).any()):
        raise InputError(f"levels must be [batch, blocks] of 0, 1 or 2, got {tuple(levels.shape)}")
    deep = levels == 2
    if not bool(deep.any()):
        return
    whole = levels.shape[1] // block_size * block_size
    spans = deep[:, :whole].unflatten(1, (-1, block_size)) if whole else deep[:, None, :0]
    if bool(deep[:, whole:].any()) or bool((spans.any(-1) != spans.all(-1)).any()):
        raise InputError(f"level 2 must cover whole spans of {block_size} blocks")
