"""Where to look among stored lens keys: all of them, or inverted lists once they are many."""

from __future__ import annotations

import contextlib
from typing import Final

import torch
from pydantic import Field
from torch import Tensor

from megacontext.config import FrozenConfig
from megacontext.errors import InputError, MemoryStoreError
from megacontext.memory.key_index_file import load_lists, save_lists, stored_at
from megacontext.memory.key_lists import FEWEST_KEYS, Codes, KeyLists, find_faiss
from megacontext.memory.key_search import KEYS_PER_CHUNK, Relevance, best_first, search_all
from megacontext.memory.tree import Memory

_LEVEL: Final = 1
_NUMBER_BYTES: Final = 2
# How many are multiplied at once may change the last bit; a scorer's own pieces stay whole.
_WHOLE: Final = 8192


class KeyIndexConfig(FrozenConfig):
    """When keys are searched by an index, and how well.

    Attributes:
        flat_keys: up to so many keys are all compared, which is exact; beyond, faiss's lists are
            used where the extra ``ann`` is installed.
        codes: what the index keeps of a key. ``pq4``: a quarter of a byte for each of its numbers;
            what is found is compared again by the stored keys. ``fp16``: all of it.
        rerank: keys per query that are compared again.
        probe_share: share of the index that a query looks into. Less than 1 is quicker and loses
            much where keys lie in no clusters.
        flat_share: keys newer than the index are all compared; once they are more than this share
            of those in it, they are added.
        growth: the lists are made anew when there are so many times the keys they were made from.
        reader_searches: a memory open for reading cannot store an index: where none fits, that many
            searches compare all keys before one is built, in working memory.
        threads: threads of faiss. Results are the same for the same number.
    """

    flat_keys: int = Field(default=1_000_000, ge=FEWEST_KEYS)
    codes: Codes = "pq4"
    rerank: int = Field(default=512, ge=1, le=1 << 20)
    probe_share: float = Field(default=1.0, gt=0, le=1)
    flat_share: float = Field(default=1 / 16, gt=0, le=1)
    growth: float = Field(default=4.0, ge=1.25, le=64)
    reader_searches: int = Field(default=32, ge=0)
    threads: int = Field(default=1, ge=1, le=256)


class KeyIndex:
    """Searches the level-1 keys of an open memory.

    Up to ``flat_keys`` keys, or without faiss, all are compared. Beyond that, inverted lists say
    which keys may be the best; what is returned of them is computed from the stored keys. The lists
    grow with the memory and are stored in its directory by whoever has it open for writing; what
    lies there is used only if it was made from these very keys and no byte of it has changed.

    Args:
        memory: open; it may grow and get new keys.
        config: when and how well.
    """

    def __init__(self, memory: Memory, config: KeyIndexConfig | None = None) -> None:
        self.memory = memory
        self.config = KeyIndexConfig() if config is None else config
        self._faiss = find_faiss()
        self._lists: KeyLists | None = None
        self._keys_file: str | None = None
        self._looked_at: tuple[object, int] | None = None
        self._searches = 0

    def search(
        self, queries: Tensor, k: int, n: int, relevance: Relevance
    ) -> tuple[Tensor, Tensor]:
        """The most relevant of the first ``n`` keys.

        Args:
            queries: ``[q, key_width]``. Where keys are many, only those with the largest inner
                products with any of them are considered: enough for a relevance that is the largest
                product, or the product with a single query.
            k: most keys to return.
            n: keys that count, from the oldest on.
            relevance: of keys ``[m, key_width]``, ``[m]``.

        Returns:
            Blocks ``[m]`` int64 and relevance ``[m]`` float32, best first, ties to the newer block.

        Raises:
            InputError: the memory has fewer keys, or the queries do not fit them.
        """
        memory, width = self.memory, self.memory.identity.key_width
        if queries.ndim != 2 or queries.shape[1] != width or k < 0:
            raise InputError(
                f"{memory.path}: queries {tuple(queries.shape)}, k {k}; expected [q, {width}] and "
                "k of at least 0"
            )
        if not 0 <= n <= memory.count(_LEVEL):
            raise InputError(
                f"{memory.path}: no {n} keys to search; there are {memory.count(_LEVEL)}"
            )
        lists = self._current() if k and n > self.config.flat_keys else None
        if lists is None:
            return self._search_all(relevance, k, 0, n)
        covered = min(n, lists.covered)
        most = max(k, self.config.rerank)
        likely = lists.find(queries, most, covered, self.config.probe_share)
        if len(likely) < min(k, covered):
            # 4-bit sums leave out keys at their very bottom, and some lists hold few keys.
            return self._search_all(relevance, k, 0, n)
        blocks, value = self._search_all(relevance, k, covered, n)
        exact = relevance(memory.keys_at(_LEVEL, likely)).float()
        return best_first(torch.cat((likely, blocks)), torch.cat((exact, value)), k)

    def update(self) -> None:
        """Builds or extends the stored index where there are keys enough for one.

        Searches do so as well. A memory open for reading is left alone.
        """
        memory = self.memory
        wanted = memory.identity.key_width and memory.count(_LEVEL) > self.config.flat_keys
        if wanted and memory.writable:
            self._current()

    def _read(self, start: int, stop: int) -> Tensor:
        return self.memory.keys(_LEVEL, start, stop)

    def _search_all(
        self, relevance: Relevance, k: int, start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        return search_all(self._read, relevance, k, start, stop, self._at_once)

    @property
    def _at_once(self) -> int:
        """Keys to read at a time: no more than half of what may stay in RAM."""
        memory = self.memory
        if memory.resident_bytes is None:
            return KEYS_PER_CHUNK
        fitting = memory.resident_bytes // 2 // (_NUMBER_BYTES * memory.identity.key_width)
        return min(KEYS_PER_CHUNK, fitting - fitting % _WHOLE or fitting)

    def _current(self) -> KeyLists | None:
        """Lists that cover enough of the keys that there are now; ``None``: compare them all."""
        if self._faiss is None:
            return None
        if self._keys_file != self.memory.keys_file:
            self._keys_file = self.memory.keys_file  # the gists were rebuilt, and keys with them
            self._lists, self._looked_at, self._searches = None, None, 0
        if self._is_behind():
            self._look_at_file()
        if self._is_behind():
            self._bring_up_to_date()
        return self._lists

    def _is_behind(self) -> bool:
        lists = self._lists
        if lists is None or self._is_outgrown(lists):
            return True
        return self._n_keys - lists.covered > self.config.flat_share * lists.covered

    def _is_outgrown(self, lists: KeyLists) -> bool:
        return self._n_keys >= self.config.growth * lists.trained_on

    @property
    def _n_keys(self) -> int:
        return self.memory.count(_LEVEL)

    def _look_at_file(self) -> None:
        """Takes what is stored if it was not looked at before, fits, and covers more keys."""
        stored = stored_at(self.memory.path)
        looked_at = (stored, self.memory.generation)
        if stored is None or looked_at == self._looked_at:
            return
        self._looked_at = looked_at
        lists = load_lists(self.memory.path, self._faiss, self.config.threads, self._stamp_of)
        if lists is not None and lists.codes == self.config.codes:
            self._lists = lists

    def _stamp_of(self, n: int) -> bytes | None:
        known = 0 if self._lists is None else self._lists.covered
        return self.memory.key_stamp(n) if known < n <= self._n_keys else None

    def _bring_up_to_date(self) -> None:
        lists = self._lists
        if lists is None or self._is_outgrown(lists):
            self._searches += 1
            if not self.memory.writable and self._searches <= self.config.reader_searches:
                return
            lists = KeyLists.train(
                self._faiss,
                self._read,
                self._n_keys,
                self.config.codes,
                self.config.threads,
                self._at_once,
            )
        lists.add(self._read, self._n_keys, self._at_once)
        self._lists, self._searches = lists, 0
        if self.memory.writable:
            # Without it on disk the next process builds it again; that is no reason to stop here.
            with contextlib.suppress(MemoryStoreError):
                save_lists(self.memory.path, lists, self.memory.key_stamp(lists.covered))
