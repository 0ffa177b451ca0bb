"""A note of the last commit that was reported to the caller, kept outside the catalog.

SQLite ends the replay of its log silently at the first damaged frame, as if what follows had never
been committed. The note tells such a loss from an append that was cut off before its commit.
"""

from __future__ import annotations

import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from megacontext.errors import CorruptMemoryError
from megacontext.memory.catalog_rows import Chunk, Snapshot
from megacontext.memory.storage_io import FILE_MODE, read_all, storing, write_all

NAME: Final = "acknowledged"
_MAGIC: Final = 0x4D434154
_VERSION: Final = 1
_FIELDS: Final = struct.Struct("<II16sQQQQI")
_CRC: Final = struct.Struct("<I")
# Two places, written by turns: a write that is cut off leaves the note before.
_SLOTS: Final = 2
_SLOT_BYTES: Final = 128
# Reading while the writer writes may find neither place whole.
_READS: Final = 5


@dataclass(frozen=True)
class Acknowledgement:
    """What was committed when the last append returned.

    Args:
        generation: number of the commit.
        n_tokens: tokens of the memory.
        row_sum: sum over the catalog's rows, 32 hexadecimal digits.
        tail: the tokens' last chunk; ``None`` for an empty memory.
    """

    generation: int
    n_tokens: int
    row_sum: str
    tail: Chunk | None

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """The note that belongs to a commit."""
        return cls(snapshot.generation, snapshot.n_tokens, snapshot.row_sum, snapshot.token_tail)

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """The newest note in a memory's directory; ``None`` if there is none.

        Raises:
            CorruptMemoryError: the file holds no whole note.
            MemoryStoreError: it cannot be read.
        """
        path = directory / NAME
        for _ in range(_READS):
            raw = _read(path)
            if raw is None:
                return None
            slots = [cls._unpack(raw[slot * _SLOT_BYTES :]) for slot in range(_SLOTS)]
            notes = [note for note in slots if note is not None]
            if notes:
                return max(notes, key=lambda note: note.generation)
        raise CorruptMemoryError("it holds no note of a commit", path=path, offset=0)

    def write(self, directory: Path, *, durable: bool = False) -> None:
        """Puts the note in the place of the one before the last.

        Args:
            directory: the memory.
            durable: waits until it is on the disk. Otherwise a power cut may bring an older note
                back, which only notices less.

        Raises:
            MemoryStoreError: it cannot be written; the last note is still there.
        """
        path = directory / NAME
        with storing(path, "write"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, FILE_MODE)
            try:
                place = self.generation % _SLOTS * _SLOT_BYTES
                write_all(descriptor, memoryview(self._pack()), place)
                if durable:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def contradiction(self, snapshot: Snapshot) -> str | None:
        """What a commit read *after* this note lacks; ``None`` if it can be its successor."""
        if snapshot.generation < self.generation:
            return (
                f"it ends with commit {snapshot.generation} and {snapshot.n_tokens} tokens, but "
                f"commit {self.generation} with {self.n_tokens} tokens was acknowledged: its log "
                "is damaged or missing, or the file is older than the memory"
            )
        if snapshot.generation == self.generation and snapshot.row_sum != self.row_sum:
            return f"commit {self.generation} is not the one that was acknowledged here"
        return None

    def _pack(self) -> bytes:
        tail = self.tail or Chunk(0, 0, 0)
        fields = _FIELDS.pack(
            _MAGIC,
            _VERSION,
            bytes.fromhex(self.row_sum),
            self.generation,
            self.n_tokens,
            tail.start,
            tail.count,
            tail.crc32,
        )
        return fields + _CRC.pack(zlib.crc32(fields))

    @classmethod
    def _unpack(cls, raw: bytes) -> Self | None:
        if len(raw) < _FIELDS.size + _CRC.size:
            return None
        if _CRC.unpack_from(raw, _FIELDS.size)[0] != zlib.crc32(raw[: _FIELDS.size]):
            return None
        magic, version, row_sum, generation, n_tokens, start, count, crc32 = _FIELDS.unpack_from(
            raw
        )
        if (magic, version) != (_MAGIC, _VERSION):
            return None
        tail = Chunk(start, count, crc32) if count else None
        return cls(generation, n_tokens, row_sum.hex(), tail)


def _read(path: Path) -> bytes | None:
    with storing(path, "read"):
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            return read_all(descriptor, _SLOTS * _SLOT_BYTES, 0)
        finally:
            os.close(descriptor)
