"""What can be read from an open memory: tokens, gists, keys, sources, search results."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from megacontext.errors import InputError, MemoryStoreError
from megacontext.memory.catalog import Catalog
from megacontext.memory.catalog_rows import FileKind, FileRecord, Snapshot
from megacontext.memory.file_set import CHUNK_BYTES, FileSet
from megacontext.memory.identity import MemoryIdentity, SourceRecord
from megacontext.memory.key_index_file import index_bytes
from megacontext.memory.records import span_count

CLOSED: Final = "is closed"


class ReadableMemory:
    """One commit of a memory.

    Args:
        path: its directory.
        catalog: open; owned by the caller.
        files: open, as of ``snapshot``; owned by the caller.
        snapshot: the commit.
    """

    def __init__(self, path: Path, catalog: Catalog, files: FileSet, snapshot: Snapshot) -> None:
        self.path = path
        self._catalog = catalog
        self._files = files
        self._snapshot = snapshot
        self._unusable: str | None = None

    @property
    def identity(self) -> MemoryIdentity:
        """What the memory was made with."""
        return self._snapshot.identity

    @property
    def n_tokens(self) -> int:
        """Committed tokens."""
        return self._snapshot.n_tokens

    @property
    def n_levels(self) -> int:
        """Levels that hold something, tokens included: 1 + the highest level with a gist."""
        level = 1
        while self.count(level):
            level += 1
        return level

    @property
    def generation(self) -> int:
        """Number of the last commit; 0 for a new memory."""
        return self._snapshot.generation

    def count(self, level: int) -> int:
        """Tokens (level 0) or gists of a level.

        Raises:
            InputError: ``level`` is negative.
        """
        if level < 0:
            raise InputError(f"{self.path}: level is {level}, it must be 0 or more")
        return span_count(self.n_tokens, self.identity.block_size, level)

    @property
    def resident_bytes(self) -> int | None:
        """Most bytes of mapped files that stay in RAM; ``None``: there is no limit."""
        return None if self._files.limit is None else self._files.limit.n_bytes

    def tokens(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Token ids ``[stop - start]`` int32, a view on the file's memory map: do not write to it.

        Raises:
            InputError: the range does not lie within the memory.
        """
        return self._read("tokens", 0, start, stop, 0, torch.int32)

    def tokens_at(self, index: Tensor) -> Tensor:
        """The token ids at ``index`` ``[m]`` int64: ``[m]`` int32, no other is read.

        Raises:
            InputError: a token does not lie within the memory.
        """
        return self._take("tokens", 0, index)

    def gists(self, level: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Gists ``[stop - start, gist_width]``: a view on the memory map, float16 or bfloat16.

        Those stored as int8 are read as new float32 numbers: ask for as many as you need, or for
        single ones with :meth:`gists_at`.

        Raises:
            InputError: the level or the range does not lie within the memory.
        """
        int8 = self.identity.gist_dtype == "int8"
        dtype = torch.float32 if int8 else self._vector_dtype
        return self._read("gists", level, start, stop, self.identity.gist_width, dtype)

    def gists_at(self, level: int, index: Tensor) -> Tensor:
        """The gists at ``index`` ``[m]`` int64: ``[m, gist_width]`` float32, no other is read.

        Raises:
            InputError: there is no such level, or a gist does not lie within the memory.
        """
        return self._take("gists", level, index).float()

    def keys(self, level: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Lens keys ``[stop - start, key_width]`` float16 or bfloat16, a view on the memory map.

        Raises:
            InputError: the level or range does not lie within the memory, or it stores no keys.
        """
        if not self.identity.key_width:
            raise InputError(f"{self.path}: this memory stores no lens keys (its key_width is 0)")
        return self._read("keys", level, start, stop, self.identity.key_width, self._vector_dtype)

    def keys_at(self, level: int, index: Tensor) -> Tensor:
        """The keys at ``index`` ``[m]`` int64, as :meth:`keys` gives them; no other is read.

        Raises:
            InputError: there is no such level, or a key does not lie within the memory.
        """
        return self._take("keys", level, index)

    @property
    def keys_file(self) -> str | None:
        """Name of the file of level-1 keys: another one once they were made anew."""
        record = self._key_record()
        return None if record is None else record.name

    def key_stamp(self, n: int) -> bytes:
        """A digest of 32 bytes of the first ``n`` level-1 keys and of what they were made with.

        It is made of the catalog's checksums; only keys behind the last full chunk are read.

        Raises:
            InputError: there are no ``n`` keys.
        """
        digest = hashlib.sha256(repr(astuple(self.identity)).encode())
        record = self._key_record()
        if record is None:
            return digest.digest()
        chunks = {chunk.start: chunk for chunk in self._catalog.chunks(record.id)}
        capacity = max(1, CHUNK_BYTES // (2 * self.identity.key_width))
        for start in range(0, n, capacity):
            chunk, count = chunks.get(start), min(capacity, n - start)
            if chunk is not None and chunk.count == count == capacity:
                checksum = chunk.crc32
            else:
                keys = self.keys(1, start, start + count)
                checksum = zlib.crc32(keys.contiguous().view(torch.uint8).numpy().data)
            digest.update(checksum.to_bytes(4, "little"))
        return digest.digest()

    def fidelity(self, level: int, start: int = 0, stop: int | None = None) -> Tensor:
        """Fidelity of gists, ``[stop - start]`` float32; NaN where none was given.

        Raises:
            InputError: the level or the range does not lie within the memory.
        """
        return self._read("fidelity", level, start, stop, 1, torch.float16)[:, 0].float()

    def fidelity_at(self, level: int, index: Tensor) -> Tensor:
        """Fidelity of the gists at ``index`` ``[m]`` int64: ``[m]`` float32, no other is read.

        Raises:
            InputError: there is no such level, or a gist does not lie within the memory.
        """
        return self._take("fidelity", level, index)[:, 0].float()

    def sources(self) -> list[SourceRecord]:
        """All sources, in the order of their tokens."""
        self._check_open()
        return self._catalog.sources(self.n_tokens)

    def source_at(self, token: int) -> SourceRecord | None:
        """The source of a token; ``None`` if it was appended without one.

        Raises:
            InputError: there is no such token.
        """
        self._check_open()
        if not 0 <= token < self.n_tokens:
            raise InputError(f"{self.path}: no token {token}; it has {self.n_tokens} of them")
        return self._catalog.source_at(token, self.n_tokens)

    def search_blocks(self, query: str, limit: int) -> tuple[Tensor, Tensor]:
        """Finds blocks by their words (BM25; see :class:`~.lexical_index.LexicalIndex`).

        Args:
            query: plain text of any kind.
            limit: most blocks to return.

        Returns:
            Block indices ``[m]`` int64 and scores ``[m]`` float32, best first, ties to the newer
            block.

        Raises:
            InputError: ``limit`` is negative.
        """
        self._check_open()
        found = self._catalog.lexical.search(
            query, limit, n_blocks=self.count(1), generation=self.generation
        )
        blocks = torch.tensor([block for block, _ in found], dtype=torch.int64)
        return blocks, torch.tensor([score for _, score in found], dtype=torch.float32)

    def term_weights(self, words: Iterable[str]) -> dict[str, float]:
        """How telling each word is in this memory: its inverse document frequency over blocks."""
        self._check_open()
        return self._catalog.lexical.idf(words, n_blocks=self.count(1), generation=self.generation)

    def stats(self) -> dict[str, Any]:
        """Sizes: ``tokens``, ``levels`` (records per level), ``sources``, ``bytes`` per part, with
        those of every level in ``level_bytes`` (``gists.L1``, ``keys.L1``, …), and their total per
        token (``bytes_per_token``, 0 for an empty memory). The catalog holds the lexical index.
        """
        self._check_open()
        parts = {"tokens": 0, "gists": 0, "keys": 0, "fidelity": 0}
        levels: dict[str, int] = {}
        for (kind, level), size in sorted(self._files.stored_bytes().items()):
            parts[kind] += size
            if level:
                levels[f"{kind}.L{level}"] = size
        parts["catalog"] = self._catalog.stored_bytes()
        parts["key_index"] = index_bytes(self.path)
        return {
            "tokens": self.n_tokens,
            "levels": [self.count(level) for level in range(self.n_levels)],
            "sources": self._catalog.count_sources(self.n_tokens),
            "bytes": parts,
            "level_bytes": levels,
            "bytes_per_token": sum(parts.values()) / self.n_tokens if self.n_tokens else 0.0,
        }

    def _key_record(self) -> FileRecord | None:
        files = self._snapshot.files
        return next((file for file in files if (file.kind, file.level) == ("keys", 1)), None)

    @property
    def _vector_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.identity.gist_dtype == "bf16" else torch.float16

    def _read(
        self,
        kind: FileKind,
        level: int,
        start: int,
        stop: int | None,
        width: int,
        dtype: torch.dtype,
    ) -> Tensor:
        self._check_open()
        if (level == 0) != (kind == "tokens"):
            raise InputError(f"{self.path}: level is {level}, {kind} have levels from 1 on")
        count = self.count(level)
        end = count if stop is None else stop
        if not 0 <= start <= end <= count:
            raise InputError(
                f"{self.path}: no {kind} of level {level} from {start} to {end}; there are {count}"
            )
        file = self._files.get(kind, level)
        return file.map(start, end) if file is not None else torch.empty((0, width), dtype=dtype)

    def _take(self, kind: FileKind, level: int, index: Tensor) -> Tensor:
        self._check_open()
        file, count = self._files.get(kind, level), self.count(level)
        if (
            file is None
            or (level == 0) != (kind == "tokens")
            or bool(((index < 0) | (index >= count)).any())
        ):
            raise InputError(f"{self.path}: no such {kind} of level {level}; there are {count}")
        return file.take(index)

    def _check_open(self) -> None:
        if self._unusable == CLOSED:
            raise MemoryStoreError(f"{self.path}: the memory {CLOSED}; open it again")
