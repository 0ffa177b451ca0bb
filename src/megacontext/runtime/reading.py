"""What the base has read of a working context, and how it reads on after an edit: the KV modes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from megacontext.errors import ConfigError, ModelError
from megacontext.runtime import kv_cache
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.context_reader import ContextReader
from megacontext.runtime.incremental_cache import Carried, behind, carry, compute, find, with_gists
from megacontext.runtime.kv_cache import ContextCache
from megacontext.runtime.working_context import WorkingContext

KVMode = Literal["exact", "incremental"]
KVChoice = Literal["auto", "exact", "incremental"]


class Reading(ABC):
    """The keys and values of one answer's window; it reads on where the window is edited.

    Args:
        base: the frozen base model.
        reader: lays contexts out for it.

    Attributes:
        window: the context read last; ``None`` before the first.
        cache: its keys and values, and those of the tokens that followed it.
    """

    def __init__(self, base: BaseModel, reader: ContextReader) -> None:
        self.base = base
        self.reader = reader
        self.window: WorkingContext | None = None
        self.cache: ContextCache = kv_cache.empty_cache(base.device)

    @abstractmethod
    def read(self, window: WorkingContext, pending: Tensor, *, asking: int = 0) -> Tensor:
        """Reads a context and the tokens behind it.

        Args:
            window: what to read.
            pending: ``[p]`` int64, tokens that are not part of it yet.
            asking: how many of the newest tokens, pending or not, are prompt and answer.

        Returns:
            Logits ``[vocab]`` of what follows.

        Raises:
            ConfigError: all of that, and a block behind it, needs more positions than the base has.
        """

    def step(self, token: Tensor) -> Tensor:
        """Reads one more token ``[1]`` int64; logits ``[vocab]`` of what follows."""
        logits = self.base.step(token, self.cache.positions[-1:] + 1, self.cache)[-1]
        self.follow(token, self.cache)  # only now: a failed step leaves no row
        return logits

    def follow(self, tokens: Tensor, cache: ContextCache) -> None:
        """Takes over what was read one by one behind its cache, here or in a batch.

        Args:
            tokens: ``[m]`` int64.
            cache: its cache, grown by them.
        """
        self.cache = cache

    @property
    def _ahead(self) -> int:
        """Positions to keep free: a block is decoded before the next look."""
        return self.reader.memory.identity.block_size


class ExactReading(Reading):
    """Computes everything from the first changed entry on.

    Tokens that were read one by one behind the context are part of what is known.
    """

    def __init__(self, base: BaseModel, reader: ContextReader) -> None:
        super().__init__(base, reader)
        self._context: ContextInput | None = None
        self._stepped: list[Tensor] = []

    def follow(self, tokens: Tensor, cache: ContextCache) -> None:
        """See :meth:`Reading.follow`."""
        super().follow(tokens, cache)
        self._stepped.append(tokens.clone())

    def read(self, window: WorkingContext, pending: Tensor, *, asking: int = 0) -> Tensor:
        """See :meth:`Reading.read`."""
        new = self.reader.read(window, pending, ahead=self._ahead)
        known = None
        if self._context is not None:
            known = self.base.resume(self.cache, self._behind(self._context), new)
        read = self.base.prefill(new, known, keep=1)
        self.window, self._context, self.cache = window, new, read.cache
        self._stepped = []
        return read.logits[-1]

    def _behind(self, context: ContextInput) -> ContextInput:
        """The context read last, with the tokens read one by one behind it."""
        if not self._stepped:
            return context
        stepped = self.base.embed(torch.cat(self._stepped))
        return replace(
            context,
            embeddings=torch.cat((context.embeddings, stepped)),
            positions=self.cache.positions,
        )


class IncrementalReading(Reading):
    """Keeps what was not edited, rotated to where it stands now, and computes the rest.

    Computed are inserted rows, the newest row, which gives the logits, and after an edit those that
    closely follow an inserted row; where the edit brought detail, which the newest of the rows that
    ask have not seen, these as well. Whatever is kept still holds what it saw when it was computed,
    so the logits differ from those of :class:`ExactReading` unless there was no edit.

    Args:
        base: the frozen base model.
        reader: lays contexts out for it.
        halo: rows behind an inserted one that are computed anew as well.
        query_tokens: most of the tokens that ask or are pending that are computed anew.

    Raises:
        ConfigError: the keys of this base cannot be rotated.
    """

    def __init__(
        self, base: BaseModel, reader: ContextReader, *, halo: int = 0, query_tokens: int = 64
    ) -> None:
        super().__init__(base, reader)
        require_rotation(base)
        self._halo = halo
        self._query_tokens = query_tokens
        # Of the gists and rows that were there before the first step, in the cache's order.
        self._ids = torch.empty(0, dtype=torch.int64)
        self._next = 0
        self.computed = 0

    @torch.inference_mode()
    def read(self, window: WorkingContext, pending: Tensor, *, asking: int = 0) -> Tensor:
        """See :meth:`Reading.read`; sets ``computed``, the rows that went through the base."""
        rows, gists = self.reader.split(self.reader.layout(window, len(pending), ahead=self._ahead))
        known = self._known_ids()
        row_source, gist_source = find(known, rows.ids), find(known, gists.ids)
        anew = (row_source < 0) | self._stale(row_source < 0, window, pending, asking)
        last = int(torch.cat((rows.positions[-1:], gists.positions[-1:])).max())
        kept_rows, kept_gists = rows[~anew], gists[gist_source >= 0]
        cache = carry(
            self.base,
            self.cache,
            Carried(
                torch.cat((gist_source[gist_source >= 0], row_source[~anew])),
                torch.cat((kept_gists.positions, kept_rows.positions)),
                len(kept_gists),
            ),
            last,
        )
        new_gists = gists[gist_source < 0]
        if len(new_gists):
            keys, values = self.reader.gist_entries(new_gists, window)
            positions = new_gists.positions.to(self.base.device)
            keys = self.base.rotation.rotate(keys, positions, last)
            cache = with_gists(cache, kv_cache.gist_cache(keys, values, positions))
        fresh = rows[anew]
        embeddings = self.reader.embed(fresh, window, pending)
        self.cache, logits = compute(self.base, cache, embeddings, fresh.positions)
        self.window, self._next = window, window.cursor + len(pending)
        self._ids = torch.cat((gists.ids, kept_rows.ids, fresh.ids))
        self.computed = len(fresh)
        return logits

    def _known_ids(self) -> Tensor:
        """What every entry of the cache stands for; tokens were read one by one behind the rest."""
        stepped = torch.arange(len(self.cache) - len(self._ids))
        return torch.cat((self._ids, stepped + self._next))

    def _stale(
        self, inserted: Tensor, window: WorkingContext, pending: Tensor, asking: int
    ) -> Tensor:
        """``[rows]`` bool: rows to compute anew although their keys and values are known."""
        n_rows = len(inserted)
        newest = 1
        stale = torch.zeros(n_rows, dtype=torch.bool)
        if self.window is not None and is_edited(self.window, window):
            stale |= behind(inserted, self._halo)
            if _shows_more(self.window, window):
                newest = max(1, min(max(len(pending), asking), self._query_tokens))
        stale[max(0, n_rows - newest) :] = True
        return stale


def new_reading(
    mode: KVMode, base: BaseModel, reader: ContextReader, *, halo: int, query_tokens: int
) -> Reading:
    """A reading that has read nothing yet; see :class:`IncrementalReading` for the numbers."""
    if mode == "exact":
        return ExactReading(base, reader)
    return IncrementalReading(base, reader, halo=halo, query_tokens=query_tokens)


def kv_mode(choice: KVChoice, base: BaseModel) -> KVMode:
    """The mode that a choice stands for; ``auto``: ``incremental`` where the base allows it.

    Raises:
        ConfigError: ``incremental`` is asked of a base whose keys cannot be moved.
    """
    if choice == "exact":
        return "exact"
    try:
        require_rotation(base)
    except ConfigError:
        if choice == "incremental":
            raise
        return "exact"
    return "incremental"


def require_rotation(base: BaseModel) -> None:
    """Refuses a base whose keys cannot be moved to other positions.

    Raises:
        ConfigError: says to use ``exact``.
    """
    try:
        _ = base.rotation
    except ModelError as error:
        raise ConfigError(
            f"kv is 'incremental', but keys of {base.name} cannot be moved to other positions; set "
            "kv to 'exact'"
        ) from error


def is_edited(old: WorkingContext, new: WorkingContext) -> bool:
    """Whether a context is more than an older one with tokens behind it."""
    return len(new) < len(old) or not torch.equal(new.keys[: len(old)], old.keys)


def _shows_more(old: WorkingContext, new: WorkingContext) -> bool:
    """Whether anything of the old context stands in finer entries in the new one."""
    shared = new.starts < old.cursor
    at = torch.searchsorted(old.starts, new.starts[shared], right=True) - 1
    return bool((new.levels[shared] < old.levels[at]).any())
