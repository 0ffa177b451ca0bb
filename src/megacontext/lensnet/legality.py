"""Which directions a working-context entry may be moved in, and the masking of scores by them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megacontext.errors import InputError

# Widths beyond this are wider than any memory, and their int64 sums would overflow.
_WIDEST = 2**60


class Legality(NamedTuple):
    """What may be done to each entry.

    Attributes:
        can_expand: bool, the entry's children may take its place.
        can_collapse: bool, its parent gist may take its place.
    """

    can_expand: Tensor
    can_collapse: Tensor


def entry_legality(
    levels: Tensor,
    starts: Tensor,
    mask: Tensor,
    *,
    cursor: Tensor,
    tail_start: Tensor,
    block_size: int,
) -> Legality:
    """Finds the legal directions of working-context entries.

    A raw block (level 0) cannot expand. An entry cannot collapse while its parent gist does not
    exist (the parent's span is not over yet: the entry is a root, or an open block), nor if the
    parent would cover a token of the tail. Padding can do nothing. That the siblings must be in
    the working context as well is the allocator's business, since one plan may first bring them
    to the right level.

    Args:
        levels: int64 ``[batch, entries]``; a level-0 entry is one block.
        starts: int64 ``[batch, entries]``, first token of each entry.
        mask: bool ``[batch, entries]``, False for padding.
        cursor: int64 ``[batch]``.
        tail_start: int64 ``[batch]``.
        block_size: tokens per block, children per gist.

    Returns:
        Two bool tensors ``[batch, entries]``.

    Raises:
        InputError: shapes differ, or a level is negative or too high for 64-bit positions.
    """
    if not levels.shape == starts.shape == mask.shape or levels.ndim != 2:
        raise InputError(
            f"levels {tuple(levels.shape)}, starts {tuple(starts.shape)} and mask "
            f"{tuple(mask.shape)} must have one shape [batch, entries]"
        )
    if cursor.shape != levels.shape[:1] or tail_start.shape != levels.shape[:1]:
        raise InputError(
            f"cursor {tuple(cursor.shape)} and tail_start {tuple(tail_start.shape)} must have "
            f"shape {tuple(levels.shape[:1])}"
        )
    widths = _parent_widths(levels, mask, block_size)
    parent_stops = (starts // widths + 1) * widths
    parent_exists = parent_stops <= cursor[:, None]
    clear_of_tail = parent_stops <= tail_start[:, None]
    return Legality(mask & (levels > 0), mask & parent_exists & clear_of_tail)


def mask_scores(scores: Tensor, legality: Legality) -> Tensor:
    """Makes scores that ask for an illegal move 0; the others are untouched.

    Args:
        scores: ``[batch, entries]``, positive asks to expand, negative to collapse.
        legality: bool tensors of the same shape.
    """
    legal = torch.where(scores > 0, legality.can_expand, legality.can_collapse)
    return scores.masked_fill(~legal, 0.0)


def _parent_widths(levels: Tensor, mask: Tensor, block_size: int) -> Tensor:
    if block_size < 2:
        raise InputError(f"block_size is {block_size}, expected at least 2")
    table = [block_size]
    while table[-1] * block_size <= _WIDEST:
        table.append(table[-1] * block_size)
    real = levels[mask]
    if real.numel() and (int(real.min()) < 0 or int(real.max()) >= len(table)):
        raise InputError(
            f"levels run from {int(real.min())} to {int(real.max())}, expected 0 to "
            f"{len(table) - 1} for block size {block_size}"
        )
    widths = torch.tensor(table, dtype=torch.int64, device=levels.device)
    return widths[levels.masked_fill(~mask, 0)]
