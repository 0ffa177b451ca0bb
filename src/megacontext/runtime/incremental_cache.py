"""Keys and values that stay while the context around them is edited.

The keys of an entry that stands at another position after an edit are rotated by the difference;
values, and what the entry saw when it was computed, stay. A cache treated so holds its rows in the
order in which they were computed or carried over, which need not be that of their positions: masks
are made from positions (:func:`attention_mask` with ``in_order=False``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext.runtime import kv_cache
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.kv_cache import ContextCache


@dataclass(frozen=True, eq=False)
class Carried:
    """Entries of a cache that live on, first gists and then rows.

    Attributes:
        source: ``[e]`` int64, index of each among all entries of the cache.
        positions: ``[e]`` int64, where each shall stand.
        n_gists: how many of them are gists.
    """

    source: Tensor
    positions: Tensor
    n_gists: int


def find(ids: Tensor, wanted: Tensor) -> Tensor:
    """Index of each of ``wanted [m]`` among distinct ``ids [n]``, int64; -1 where there is none."""
    if not len(ids):
        return torch.full_like(wanted, -1)
    ordered, order = torch.sort(ids)
    place = torch.searchsorted(ordered, wanted).clamp(max=len(ids) - 1)
    return torch.where(ordered[place] == wanted, order[place], -1)


def behind(inserted: Tensor, reach: int) -> Tensor:
    """``[n]`` bool: at most ``reach`` places behind one where ``inserted [n]`` bool is set."""
    counts = torch.cat((inserted.new_zeros(1, dtype=torch.int64), inserted.cumsum(0)))
    here = torch.arange(len(inserted))
    return counts[here] > counts[(here - reach).clamp(min=0)]


def carry(
    base: BaseModel, cache: ContextCache, carried: Carried, last_position: int
) -> ContextCache:
    """A cache of the entries that live on, each at its new position; ``cache`` stays as it was.

    Args:
        base: rotates.
        cache: what was read so far.
        carried: what of it lives on.
        last_position: greatest position of the context to come; see :meth:`KeyRotation.rotate`.
    """
    source, positions = carried.source.to(base.device), carried.positions.to(base.device)
    before = torch.cat((cache.gist_positions, cache.positions))
    n_gists = carried.n_gists
    at = before[source]
    still = torch.equal(at, positions)
    if still and n_gists == cache.n_gists and _is_beginning(carried.source):
        return kv_cache.crop(cache, len(source) - n_gists)
    layers = kv_cache.layer_entries(cache.entries)
    keys = [keys.index_select(2, source) for keys, _ in layers]
    if not still:
        keys = base.rotation.shift(
            keys,
            at,
            positions,
            last_position=int(before.max()),
            new_last_position=last_position,
        )
    entries = kv_cache.new_entries()
    for index, (_, values) in enumerate(layers):
        entries.update(keys[index], values.index_select(2, source), index)
    return ContextCache(entries, positions[:n_gists], positions[n_gists:])


def with_gists(cache: ContextCache, gists: ContextCache) -> ContextCache:
    """The gists of both caches in the order of their positions, then the rows of ``cache``."""
    if not len(cache):
        return gists
    positions, order = torch.cat((cache.gist_positions, gists.gist_positions)).sort()
    old, new = cache.n_gists, gists.n_gists
    rows = torch.arange(old + new, len(cache) + new, device=order.device)
    order = torch.cat((order, rows))
    entries = kv_cache.new_entries()
    pairs = zip(
        kv_cache.layer_entries(cache.entries), kv_cache.layer_entries(gists.entries), strict=True
    )
    for index, pair in enumerate(pairs):
        keys, values = (
            torch.cat((mine[:, :, :old], theirs, mine[:, :, old:]), dim=2).index_select(2, order)
            for mine, theirs in zip(*pair, strict=True)
        )
        entries.update(keys, values, index)
    return ContextCache(entries, positions, cache.positions)


def compute(
    base: BaseModel, cache: ContextCache, embeddings: Tensor, positions: Tensor
) -> tuple[ContextCache, Tensor]:
    """Computes rows anywhere among those of a cache, all in one forward.

    Every row sees what stands at lower positions, whether it was there before or comes with it.

    Args:
        base: the base model.
        cache: gists and rows that are known.
        embeddings: ``[m, d_model]``.
        positions: ``[m]`` int64, increasing, each at no position of the cache.

    Returns:
        The cache with the new rows at its end, and the logits ``[vocab]`` of the last of them.
    """
    positions = positions.to(base.device)
    grown = ContextCache(
        kv_cache.fork_entries(cache.entries),
        cache.gist_positions,
        torch.cat((cache.positions, positions)),
    )
    if cache.n_rows == 0 or bool(cache.positions.max() < positions[0]):
        mask = base.mask_for(grown, len(positions))
    else:
        mask = kv_cache.attention_mask(
            base.architecture,
            gist_positions=grown.gist_positions[None],
            positions=grown.positions[None],
            n_queries=len(positions),
            dtype=base.dtype,
            in_order=False,
        )
    output = base.forward_rows(embeddings[None], positions[None], grown.entries, mask, 1)
    return grown, output.logits[0, -1]


def _is_beginning(source: Tensor) -> bool:
    return bool((source == torch.arange(len(source))).all())
