"""The keys and values of a working context: gist entries first, then the rows the model computed.

In ``exact`` mode an edit recomputes everything from the first edited row on: :func:`common_prefix`
says how many rows survive, :func:`crop` keeps them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from megacontext.errors import InputError
from megacontext.runtime.architectures import Architecture
from megacontext.runtime.context_input import ContextInput


@dataclass(eq=False)
class ContextCache:
    """Keys and values of one sequence, with the positions needed to mask them.

    Attributes:
        entries: the ``DynamicCache`` of transformers, ``[1, kv_heads, gists + rows, dim]`` per
            layer. Sliding layers are kept whole, so that any suffix can be dropped again.
        gist_positions: ``[gists]`` int64.
        positions: ``[rows]`` int64.
    """

    entries: Any
    gist_positions: Tensor
    positions: Tensor

    @property
    def n_gists(self) -> int:
        """Entries that came with their own keys and values."""
        return self.gist_positions.shape[0]

    @property
    def n_rows(self) -> int:
        """Entries computed by the base model."""
        return self.positions.shape[0]

    def __len__(self) -> int:
        return self.n_gists + self.n_rows


def new_entries() -> Any:
    """An empty ``DynamicCache`` that keeps every layer whole, sliding ones too."""
    return DynamicCache()


def empty_cache(device: torch.device) -> ContextCache:
    """A cache without entries."""
    none = torch.empty(0, dtype=torch.int64, device=device)
    return ContextCache(new_entries(), none, none)


def gist_cache(rotated_keys: Tensor, values: Tensor, positions: Tensor) -> ContextCache:
    """A cache that holds gists and no rows yet.

    Args:
        rotated_keys: ``[layers, gists, kv_heads, head_dim]``, rotated to ``positions``.
        values: ``[layers, gists, kv_heads, value_dim]``.
        positions: ``[gists]`` int64.
    """
    cache = empty_cache(positions.device)
    for layer in range(rotated_keys.shape[0]):
        cache.entries.update(
            rotated_keys[layer].transpose(0, 1)[None], values[layer].transpose(0, 1)[None], layer
        )
    cache.gist_positions = positions
    return cache


def fork_entries(entries: Any) -> Any:
    """The same entries in objects of their own; storage is shared, and growing copies it."""
    fork = copy.copy(entries)
    fork.layers = [copy.copy(layer) for layer in entries.layers]
    return fork


def crop(cache: ContextCache, n_rows: int) -> ContextCache:
    """The same cache with its first ``n_rows`` rows only; all gists stay.

    The result shares storage with ``cache``, and neither changes when the other grows: growing
    copies. ``crop(cache, cache.n_rows)`` is therefore a cheap fork.

    Raises:
        InputError: the cache holds fewer rows.
    """
    if not 0 <= n_rows <= cache.n_rows:
        raise InputError(f"cannot keep {n_rows} rows of a cache that holds {cache.n_rows}")
    return ContextCache(
        _sliced(cache.entries, 0, cache.n_gists + n_rows),
        cache.gist_positions,
        cache.positions[:n_rows],
    )


def replace_gists(cache: ContextCache, gists: ContextCache) -> ContextCache:
    """The rows of ``cache`` behind the gist entries of ``gists``.

    Only right where no row of ``cache`` sees a gist that differs (see :func:`common_prefix`).
    """
    rows = _sliced(cache.entries, cache.n_gists, len(cache))
    joined = _sliced(gists.entries, 0, gists.n_gists)
    for index, (keys, values) in enumerate(layer_entries(rows)):
        joined.update(keys, values, index)
    return ContextCache(joined, gists.gist_positions, cache.positions)


def common_prefix(old: ContextInput, new: ContextInput) -> int:
    """How many leading rows have the same keys and values in both contexts.

    These are the rows with equal embeddings and positions which see equal gists only.
    """
    n = min(old.n_rows, new.n_rows)
    equal = (old.positions[:n] == new.positions[:n]) & (
        old.embeddings[:n] == new.embeddings[:n]
    ).all(dim=-1)
    same = equal.cumprod(dim=0).sum()
    changed = _first_changed_gist_position(old, new)
    if changed is not None:
        # A row at position p sees the gists below p.
        same = torch.minimum(same, (new.positions[:n] <= changed).sum())
    return int(same)


def same_gists(old: ContextInput, new: ContextInput) -> bool:
    """Whether both contexts hold the same ``kv`` gists at the same positions."""
    return _first_changed_gist_position(old, new) is None


def attention_mask(
    architecture: Architecture,
    *,
    gist_positions: Tensor,
    positions: Tensor,
    n_queries: int,
    dtype: torch.dtype,
    gist_valid: Tensor | None = None,
    row_valid: Tensor | None = None,
    in_order: bool = True,
) -> Tensor | dict[str, Tensor]:
    """The explicit additive mask of the last ``n_queries`` rows.

    Rows see themselves and the valid rows before them; a row at position p sees the valid gists
    below p; sliding layers see, of both, what lies less than the window's width behind.

    Args:
        architecture: facts of the base model.
        gist_positions: ``[batch, gists]`` int64.
        positions: ``[batch, rows]`` int64, of cached and new rows.
        n_queries: the rows, counted from the end, that are about to be computed.
        dtype: dtype of the mask: that of the model.
        gist_valid: ``[batch, gists]`` bool; ``False`` marks padding.
        row_valid: ``[batch, rows]`` bool; ``False`` marks padding.
        in_order: whether the rows stand in the order of their positions, as padding does not. If
            not, no two have one position, and "before" is what lies at a lower one.

    Returns:
        ``[batch, 1, n_queries, gists + rows]``; or, for a model that mixes full and sliding
        layers, the mapping from layer type to mask which its forward takes.
    """
    queries = positions[:, -n_queries:, None]
    order = torch.arange(positions.shape[1], device=positions.device)
    query_order = order[-n_queries:, None]
    if in_order:
        rows = (order <= query_order)[None].expand(positions.shape[0], -1, -1)
    else:
        rows = positions[:, None] <= queries
    if row_valid is not None:
        # Padding sees itself: a query without any key would have no defined attention.
        rows = (rows & row_valid[:, None]) | (order == query_order)
    gists = gist_positions[:, None] < queries
    if gist_valid is not None:
        gists = gists & gist_valid[:, None]
    masks: dict[str, Tensor] = {}
    if "full" in architecture.layer_kinds:
        masks["full_attention"] = _additive(gists, rows, dtype)
    if architecture.sliding_window is not None:
        near_rows = queries - positions[:, None] < architecture.sliding_window
        near_gists = queries - gist_positions[:, None] < architecture.sliding_window
        masks["sliding_attention"] = _additive(gists & near_gists, rows & near_rows, dtype)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _additive(gists: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    visible = torch.cat([gists, rows], dim=-1)[:, None]
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)


def layer_entries(entries: Any) -> list[tuple[Tensor, Tensor]]:
    """Keys and values per layer, ``[batch, kv_heads, entries, dim]`` each; empty before any."""
    return [(layer.keys, layer.values) for layer in entries.layers]


def _sliced(entries: Any, start: int, stop: int) -> Any:
    part = fork_entries(entries)
    for layer in part.layers:
        layer.keys = layer.keys[..., start:stop, :]
        layer.values = layer.values[..., start:stop, :]
    return part


def _first_changed_gist_position(old: ContextInput, new: ContextInput) -> int | None:
    """Lowest position at which the ``kv`` gists of two contexts differ; ``None``: nowhere."""
    before, after = old.gists, new.gists
    same = 0
    if before is not None and after is not None:
        n = min(old.n_gists, new.n_gists)
        equal = before[2][:n] == after[2][:n]
        for was, now in zip(before[:2], after[:2], strict=True):
            equal &= (was[:, :n] == now[:, :n]).flatten(2).all(dim=-1).all(dim=0)
        same = int(equal.cumprod(dim=0).sum())
    rest = [gists[2][same] for gists in (before, after) if gists and gists[2].shape[0] > same]
    return int(torch.stack(rest).min()) if rest else None
