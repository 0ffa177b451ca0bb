"""The file of a key index: written beside the old one, loaded only when every byte is vouched for.

It is derived from the keys. So a file that is damaged, of another memory, or of keys that are no
longer there counts as lost, which costs the time to build it again and nothing else.

Little-endian: magic ``MCKI`` · version u16 · level u16 · key width u32 · lists u32 · keys that the
lists were trained on u64 · keys covered u64 · bytes of the body u64 · stamp of the covered keys 32
bytes · SHA-256 of body and all of the above · the body as faiss writes it.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Self

from megacontext.memory.key_lists import KeyLists
from megacontext.memory.storage_io import FILE_MODE, storing, sync_directory

INDEX_NAME: Final = "keys.L1.faiss"
_DRAFT_NAME: Final = f"{INDEX_NAME}.new"
_MAGIC: Final = b"MCKI"
_VERSION: Final = 1
_LEVEL: Final = 1
_FIELDS: Final = struct.Struct("<4sHHIIQQQ32s")
_DIGEST_BYTES: Final = 32
_READ_BYTES: Final = 1 << 20


class _Header(NamedTuple):
    """What stands before the body and its checksum."""

    magic: bytes
    version: int
    level: int
    width: int
    lists: int
    trained_on: int
    covered: int
    body_bytes: int
    stamp: bytes

    @classmethod
    def read(cls, file: BinaryIO) -> Self | None:
        raw = file.read(_FIELDS.size)
        if len(raw) < _FIELDS.size:
            return None
        header = cls(*_FIELDS.unpack(raw))
        known = (header.magic, header.version, header.level) == (_MAGIC, _VERSION, _LEVEL)
        return header if known else None

    def pack(self) -> bytes:
        return _FIELDS.pack(*self)


def save_lists(directory: Path, lists: KeyLists, stamp: bytes) -> None:
    """Puts lists in the place of the stored ones, completely or not at all.

    Args:
        directory: the memory's.
        lists: over its level-1 keys.
        stamp: 32 bytes that tell the keys in the lists from any others.

    Raises:
        StorageFullError, ReadOnlyMemoryError, MemoryStoreError: they could not be written; what
            was stored before is still there.
    """
    draft = directory / _DRAFT_NAME
    with storing(directory / INDEX_NAME, "write"):
        try:
            descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC, FILE_MODE)
            with os.fdopen(descriptor, "wb") as file:
                _write(file, lists, stamp)
                file.flush()
                os.fsync(descriptor)
            draft.replace(directory / INDEX_NAME)
            sync_directory(directory)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def load_lists(
    directory: Path, faiss: Any, threads: int, stamp_of: Callable[[int], bytes | None]
) -> KeyLists | None:
    """The stored lists, if they are whole and over the right keys.

    Args:
        directory: the memory's.
        faiss: the module.
        threads: threads the lists work with.
        stamp_of: the stamp of so many of the memory's keys, the oldest; ``None``: there are fewer.
    """
    try:
        with (directory / INDEX_NAME).open("rb") as file:
            header = _Header.read(file)
            if header is None or header.stamp != stamp_of(header.covered):
                return None
            if not _is_whole(file, header):
                return None
            file.seek(_FIELDS.size + _DIGEST_BYTES)
            lists = KeyLists.load(faiss, file.read, header.trained_on, threads)
    except OSError:
        return None
    if lists is None:
        return None
    found = (lists.covered, lists.width, lists.lists)
    return lists if found == (header.covered, header.width, header.lists) else None


def stored_at(directory: Path) -> tuple[int, int, int] | None:
    """Tells one stored file from the next; ``None`` where there is none."""
    try:
        status = (directory / INDEX_NAME).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def index_bytes(directory: Path) -> int:
    """Size of what is stored; 0 where there is nothing."""
    stored = stored_at(directory)
    return 0 if stored is None else stored[2]


def remove_lists(directory: Path) -> None:
    """Removes what is stored, and what a process that was killed left behind.

    Raises:
        MemoryStoreError: it cannot be removed.
    """
    for name in (INDEX_NAME, _DRAFT_NAME):
        with storing(directory / name, "remove"):
            (directory / name).unlink(missing_ok=True)


def _write(file: BinaryIO, lists: KeyLists, stamp: bytes) -> None:
    digest = hashlib.sha256()
    file.seek(_FIELDS.size + _DIGEST_BYTES)
    failure: list[OSError] = []
    size = 0

    def take(piece: bytes) -> int:
        # An exception does not get through faiss, which says only that fewer bytes were taken.
        nonlocal size
        try:
            file.write(piece)
        except OSError as error:
            failure.append(error)
            return 0
        digest.update(piece)
        size += len(piece)
        return len(piece)

    try:
        lists.save(take)
    except RuntimeError:
        if failure:
            raise failure[0] from None
        raise
    header = _Header(
        _MAGIC,
        _VERSION,
        _LEVEL,
        lists.width,
        lists.lists,
        lists.trained_on,
        lists.covered,
        size,
        stamp,
    ).pack()
    digest.update(header)
    file.seek(0)
    file.write(header + digest.digest())


def _is_whole(file: BinaryIO, header: _Header) -> bool:
    """Whether the checksum holds for what follows the header."""
    expected = file.read(_DIGEST_BYTES)
    digest, size = hashlib.sha256(), 0
    while piece := file.read(_READ_BYTES):
        digest.update(piece)
        size += len(piece)
    digest.update(header.pack())
    return size == header.body_bytes and digest.digest() == expected
