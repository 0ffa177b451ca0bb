"""Keys and values of several sequences side by side, for one forward over all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import Cache, StaticLayer

from megacontext.runtime import kv_cache
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.kv_cache import ContextCache


class BatchCache:
    """A batch of sequences, a row each, that read one token at a time together.

    A row's own entries stand in its first columns; tokens read since have one column for all rows,
    behind those of the longest. What a row does not use is masked. The columns are allocated ahead,
    so that a token is written in place.

    Args:
        base: the frozen base model.
        caches: what each sequence has read so far, a row or more; they stay as they are.
        room: columns for tokens to come.
    """

    @torch.inference_mode()
    def __init__(self, base: BaseModel, caches: Sequence[ContextCache], room: int) -> None:
        self._base = base
        self._caches = list(caches)
        self._columns = max(len(cache) for cache in caches) + room
        n_rows = len(caches)
        layers: list[Any] = [StaticLayer(self._columns) for _ in range(base.n_layers)]
        for layer, (keys, values) in zip(
            layers, kv_cache.layer_entries(caches[0].entries), strict=True
        ):
            layer.lazy_initialization(
                keys.expand(n_rows, -1, -1, -1), values.expand(n_rows, -1, -1, -1)
            )
        self._entries: Any = Cache(layers=layers)
        shape = (n_rows, self._columns)
        self._tokens = torch.zeros(shape, dtype=torch.int64)
        self._positions = torch.zeros(shape, dtype=torch.int64, device=base.device)
        self._valid = torch.zeros(shape, dtype=torch.bool, device=base.device)
        # Per row: its own entries, and the columns up to its newest token.
        self._own = [0] * n_rows
        self._used = [0] * n_rows
        for row, cache in enumerate(caches):
            self.place(row, cache)

    def has_room(self, caches: Sequence[ContextCache]) -> bool:
        """Whether a token can follow once :meth:`place` has put these caches into rows."""
        return max(*self._used, *(len(cache) for cache in caches), 0) < self._columns

    @torch.inference_mode()
    def place(self, row: int, cache: ContextCache) -> None:
        """Puts another cache into a row, such as one read anew; :meth:`has_room` for it."""
        n = len(cache)
        for layer, (keys, values) in zip(
            self._entries.layers, kv_cache.layer_entries(cache.entries), strict=True
        ):
            layer.keys[row, :, :n] = keys[0]
            layer.values[row, :, :n] = values[0]
        self._positions[row, :n] = torch.cat((cache.gist_positions, cache.positions))
        self._valid[row] = torch.arange(self._columns, device=self._valid.device) < n
        self._caches[row] = cache
        self._own[row] = self._used[row] = n

    @torch.inference_mode()
    def step(self, tokens: Mapping[int, int]) -> Tensor:
        """Reads one more token in some of the rows, in one forward.

        Args:
            tokens: by row, the token behind what the row holds. Other rows hold what they held.

        Returns:
            Logits ``[rows, vocab]`` of what follows, in the model's dtype; those of rows without a
            token mean nothing.
        """
        base, column, rows = self._base, max(self._used), list(tokens)
        ids = torch.zeros(len(self._caches), 1, dtype=torch.int64)
        ids[rows, 0] = torch.tensor([tokens[row] for row in rows])
        self._positions[:, column] = 0
        for row in rows:
            self._positions[row, column] = self._positions[row, self._used[row] - 1] + 1
        positions = self._positions[:, column : column + 1]
        for layer in self._entries.layers:
            layer.cumulative_length.fill_(column)
        output = base.forward_rows(base.embed(ids), positions, self._entries, self._mask(column), 1)
        # Only now, so that a failed forward leaves all rows as they were.
        self._tokens[:, column] = ids[:, 0]
        self._valid[rows, column] = True
        for row in rows:
            self._used[row] = column + 1
        return output.logits[:, -1]

    @torch.inference_mode()
    def grown(self, row: int) -> tuple[Tensor, ContextCache]:
        """What a row holds, by itself.

        Returns:
            The tokens ``[m]`` int64 read since it was placed, and its cache with them.
        """
        cache, own, used = self._caches[row], self._own[row], self._used[row]
        if used == own:
            return self._tokens[row, :0], cache
        columns = self._valid[row, own:used].nonzero()[:, 0] + own
        entries = kv_cache.fork_entries(cache.entries)
        for index, layer in enumerate(self._entries.layers):
            keys, values = (
                held[row].index_select(1, columns)[None] for held in (layer.keys, layer.values)
            )
            entries.update(keys, values, index)
        positions = torch.cat((cache.positions, self._positions[row, columns]))
        tokens = self._tokens[row, columns.to(self._tokens.device)]
        return tokens, ContextCache(entries, cache.gist_positions, positions)

    def _mask(self, column: int) -> Tensor | dict[str, Tensor]:
        """The mask of tokens at ``column``: all that a row holds, gists too, precedes them."""
        n = column + 1
        masks = kv_cache.attention_mask(
            self._base.architecture,
            gist_positions=self._positions[:, :0],
            positions=self._positions[:, :n],
            n_queries=1,
            dtype=self._base.dtype,
            row_valid=self._valid[:, :n],
        )
        unused, hidden = (0, self._columns - n), torch.finfo(self._base.dtype).min
        if isinstance(masks, Tensor):
            return pad(masks, unused, value=hidden)
        return {kind: pad(mask, unused, value=hidden) for kind, mask in masks.items()}


def turns_by_length(base: BaseModel) -> bool:
    """Whether the base rotates all sequences of a batch as suits the longest of them.

    Scaled rotary embeddings of the kinds ``dynamic`` and ``longrope`` choose their frequencies by
    the greatest position of the whole forward.
    """
    rotary = getattr(base.model.get_decoder(), "rotary_emb", None)
    kinds = getattr(rotary, "rope_type", "default")
    named = kinds.values() if isinstance(kinds, dict) else (kinds,)
    return any(kind == "longrope" or "dynamic" in kind for kind in named)
