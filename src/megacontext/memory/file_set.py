"""The ``.ctx`` files of one memory: opened as committed, grown in stages, cut back on failure."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from megacontext.errors import CorruptMemoryError
from megacontext.memory.catalog_rows import (
    Chunk,
    FileKind,
    FileRecord,
    FileUpdate,
    Snapshot,
    file_name,
)
from megacontext.memory.ctx_file import CtxFile
from megacontext.memory.ctx_header import CtxDtype, CtxHeader, fit_model_name
from megacontext.memory.identity import MemoryIdentity
from megacontext.memory.resident import ResidentLimit
from megacontext.memory.storage_io import storing, sync_directory

CHUNK_BYTES: Final = 1 << 18
"""A checksum covers at most this much, so that checking the newest one at opening stays cheap."""

_SYNC_THREADS: Final = 3
"""A commit of one block syncs four files: one in the caller's thread, the others in these."""


def header_for(identity: MemoryIdentity, kind: FileKind, level: int) -> CtxHeader:
    """The header that a file of this kind and level has in a memory of this identity."""
    widths: dict[FileKind, int] = {
        "tokens": 0,
        "gists": identity.gist_width,
        "keys": identity.key_width,
        "fidelity": 1,
    }
    vectors = CtxDtype.BF16 if identity.gist_dtype == "bf16" else CtxDtype.FP16
    dtypes = {"tokens": CtxDtype.U32, "fidelity": CtxDtype.FP16}
    if identity.gist_dtype == "int8":
        dtypes["gists"] = CtxDtype.INT8  # keys are compared by the thousand, as they are stored
    return CtxHeader(
        level=level,
        block_size=identity.block_size,
        width=widths[kind],
        dtype=dtypes.get(kind, vectors),
        base_model=fit_model_name(identity.base_model),
    )


@dataclass
class _Growing:
    """A file, and what has been appended to it since the last commit."""

    id: int | None
    name: str
    kind: FileKind
    level: int
    file: CtxFile
    length: int
    tail: Chunk | None
    chunks: list[Chunk] = field(default_factory=list[Chunk])


class FileSet:
    """All open files of a memory, by kind and level.

    Args:
        directory: the memory's.
        writable: whether they are opened to be written to.
        limit: to what stays in RAM of their maps.
    """

    def __init__(
        self, directory: Path, *, writable: bool, limit: ResidentLimit | None = None
    ) -> None:
        self.directory = directory
        self.limit = limit
        self._writable = writable
        self._files: dict[tuple[FileKind, int], _Growing] = {}
        self._created: list[_Growing] = []
        self._threads: ThreadPoolExecutor | None = None

    def load(self, snapshot: Snapshot, *, check_tails: bool) -> None:
        """Opens what is new in a snapshot and extends what has grown.

        Args:
            snapshot: the commit to show from now on.
            check_tails: compares the last chunk of every newly opened file with its checksum.

        Raises:
            CorruptMemoryError: a file does not hold what the catalog says.
            MemoryVersionError: a file has an unknown version.
        """
        opened: dict[tuple[FileKind, int], _Growing] = {}
        try:
            for record in snapshot.files:
                place = (record.kind, record.level)
                known = self._files.get(place)
                if known is not None and known.name == record.name:
                    known.file.extend_to(record.length)
                    opened[place] = known
                else:
                    file = self._open(record, snapshot.identity, check_tail=check_tails)
                    opened[place] = _growing(record, file)
        except BaseException:
            for place, growing in opened.items():
                if self._files.get(place) is not growing:
                    growing.file.close()
            raise
        for place, growing in self._files.items():
            if opened.get(place) is not growing:
                growing.file.close()
        self._files = opened
        for record in snapshot.files:
            growing = opened[record.kind, record.level]
            growing.id, growing.length, growing.tail = record.id, record.length, record.tail
            growing.chunks = []
        self._created = []

    def get(self, kind: FileKind, level: int) -> CtxFile | None:
        """The file of a level, if there is one."""
        growing = self._files.get((kind, level))
        return growing.file if growing is not None else None

    def create(self, kind: FileKind, level: int, header: CtxHeader, generation: int = 0) -> None:
        """Makes an empty file; it stays if the next commit names it."""
        name = file_name(kind, level, generation)
        file = CtxFile.create(self.directory / name, header, limit=self.limit)
        growing = _Growing(None, name, kind, level, file, 0, None)
        self._files[kind, level] = growing
        self._created.append(growing)

    def append(self, kind: FileKind, level: int, records: npt.NDArray[Any]) -> None:
        """Appends records; they count when the next commit names the file."""
        growing = self._files[kind, level]
        start = growing.file.length
        raw = growing.file.append(records)
        for chunk in _checksums(growing, start, raw):
            if growing.chunks and growing.chunks[-1].start == chunk.start:
                growing.chunks[-1] = chunk
            else:
                growing.chunks.append(chunk)

    def sync(self) -> list[FileUpdate]:
        """Brings everything appended to the disk, and says what the catalog has to record."""
        grown = [growing for growing in self._files.values() if growing.chunks]
        self._sync_files([growing.file for growing in grown])
        if self._created:
            with storing(self.directory, "sync"):
                sync_directory(self.directory)
        return [
            FileUpdate(
                growing.id,
                growing.name,
                growing.kind,
                growing.level,
                growing.file.length,
                tuple(growing.chunks),
            )
            for growing in grown
        ]

    def discard(self) -> None:
        """Cuts every file back to the last commit and removes those made since.

        Raises:
            MemoryStoreError: a file could not be cut or removed.
        """
        created, self._created = self._created, []
        for growing in created:
            growing.file.close()
            if self._files.get((growing.kind, growing.level)) is growing:
                del self._files[growing.kind, growing.level]
        for growing in self._files.values():
            growing.chunks = []
            if growing.file.length > growing.length or self._surplus(growing):
                growing.file.truncate(growing.length)
        for growing in created:
            with storing(growing.file.path, "remove"):
                growing.file.path.unlink(missing_ok=True)

    def trim(self) -> None:
        """Cuts torn appends off and removes files the catalog does not know (writers only)."""
        for growing in self._files.values():
            if self._surplus(growing):
                growing.file.truncate(growing.length)
        known = {growing.name for growing in self._files.values()}
        for path in self.directory.glob("*.ctx"):
            if path.name not in known:
                with storing(path, "remove"):
                    path.unlink()

    def stored_bytes(self) -> dict[tuple[FileKind, int], int]:
        """Committed bytes by kind and level, headers included."""
        return {
            place: growing.file.offset(growing.file.length)
            for place, growing in self._files.items()
        }

    def close(self) -> None:
        """Closes all files; mapped tensors stay usable."""
        for growing in self._files.values():
            growing.file.close()
        self._files = {}
        self._created = []
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _sync_files(self, files: Sequence[CtxFile]) -> None:
        """Syncs files at the same time.

        Syncs that wait together can share a commit of the file system's journal and a flush of the
        disk; one after the other, each waits for its own.

        Raises:
            StorageFullError, MemoryStoreError: a file cannot be brought to the disk; no sync of
                another one is left under way.
        """
        if self._threads is None:
            self._threads = ThreadPoolExecutor(_SYNC_THREADS, "megacontext-sync")
        waiting: list[Future[None]] = []
        # No thread can be had while the interpreter shuts down, or beyond a limit of the system.
        with contextlib.suppress(RuntimeError):
            waiting.extend(self._threads.submit(file.fsync) for file in files[1:])
        try:
            for file in (*files[:1], *files[1 + len(waiting) :]):
                file.fsync()
        finally:
            wait(waiting)
        for sync in waiting:
            sync.result()

    def _surplus(self, growing: _Growing) -> bool:
        return growing.file.stored_bytes() > growing.file.offset(growing.length)

    def _open(self, record: FileRecord, identity: MemoryIdentity, *, check_tail: bool) -> CtxFile:
        path = self.directory / record.name
        file = CtxFile.open(path, writable=self._writable, length=0, limit=self.limit)
        try:
            expected = header_for(identity, record.kind, record.level)
            if file.header != expected:
                raise CorruptMemoryError(
                    f"the header says {file.header}, the catalog {expected}",
                    path=path,
                    level=record.level,
                    offset=0,
                )
            file.extend_to(record.length)
            if check_tail and record.tail is not None:
                check_chunk(file, record.tail)
        except BaseException:
            file.close()
            raise
        return file


def check_chunk(file: CtxFile, chunk: Chunk) -> int:
    """Compares one chunk with its checksum.

    Returns:
        The bytes compared.

    Raises:
        CorruptMemoryError: they differ.
    """
    checksum, n_bytes = file.crc32(chunk.start, chunk.count)
    if n_bytes != chunk.count * file.header.record_bytes:
        stored = file.stored_records()
        raise CorruptMemoryError(
            f"the file holds {stored} complete records, the catalog has more",
            path=file.path,
            level=file.header.level,
            index=stored,
            offset=file.offset(stored),
        )
    if checksum != chunk.crc32:
        raise CorruptMemoryError(
            f"{chunk.count} records have checksum {checksum:08x}, the catalog {chunk.crc32:08x}",
            path=file.path,
            level=file.header.level,
            index=chunk.start,
            offset=file.offset(chunk.start),
        )
    return n_bytes


def _growing(record: FileRecord, file: CtxFile) -> _Growing:
    return _Growing(
        record.id, record.name, record.kind, record.level, file, record.length, record.tail
    )


def _checksums(growing: _Growing, start: int, raw: memoryview) -> list[Chunk]:
    """Chunks that records written at ``start`` add, the first one going on where the last ended."""
    record_bytes = growing.file.header.record_bytes
    capacity = max(1, CHUNK_BYTES // record_bytes)
    tail = growing.chunks[-1] if growing.chunks else growing.tail
    if tail is None or tail.count >= capacity:
        tail = Chunk(start, 0, 0)
    chunks: list[Chunk] = []
    done, total = 0, len(raw) // record_bytes
    while done < total:
        count = min(capacity - tail.count, total - done)
        piece = raw[done * record_bytes : (done + count) * record_bytes]
        chunks.append(Chunk(tail.start, tail.count + count, zlib.crc32(piece, tail.crc32)))
        done += count
        tail = Chunk(start + done, 0, 0)
    return chunks
