"""Exact search over stored lens keys, in constant memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

KEYS_PER_CHUNK: Final = 65_536
"""Keys that are read and compared at a time."""

ReadKeys = Callable[[int, int], Tensor]
"""Reads the keys ``[stop - start, key_width]`` from an index to another, any floating type."""

Relevance = Callable[[Tensor], Tensor]
"""Says how relevant each of the keys ``[m, key_width]`` is: ``[m]`` floating."""


def search_all(
    read: ReadKeys,
    relevance: Relevance,
    k: int,
    start: int,
    stop: int,
    at_once: int = KEYS_PER_CHUNK,
) -> tuple[Tensor, Tensor]:
    """The most relevant of all keys from one index to another.

    Args:
        read: reads keys.
        relevance: compares them.
        k: most keys to return.
        start: index of the first key that counts.
        stop: one past the last.
        at_once: keys to read and compare at a time.

    Returns:
        Indices ``[m]`` int64 and relevance ``[m]`` float32, best first, ties to the newer key.
    """
    best = torch.empty(0, dtype=torch.int64), torch.empty(0)
    for first in range(start, stop, at_once):
        keys = read(first, min(stop, first + at_once))
        found = relevance(keys).float()
        here = _largest(found, k)
        index, value = torch.cat((best[0], here + first)), torch.cat((best[1], found[here]))
        best = best_first(index, value, k)
    return best


def best_first(index: Tensor, value: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest values ``[m]`` and their indices, best first, ties to the higher index."""
    newest = index.argsort(descending=True)
    order = newest[value[newest].sort(descending=True, stable=True).indices][:k]
    return index[order], value[order]


def _largest(value: Tensor, k: int) -> Tensor:
    """Places of the ``k`` largest values ``[m]``, in no order; of equal ones the last."""
    if k >= len(value):
        return torch.arange(len(value))
    if k <= 0:
        return torch.empty(0, dtype=torch.int64)
    floor = value.topk(k).values[-1]
    above = (value > floor).nonzero()[:, 0]
    level = (value == floor).nonzero()[:, 0]
    return torch.cat((above, level[len(level) - (k - len(above)) :]))
