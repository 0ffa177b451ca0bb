"""Complete writes, reads and syncs, and what an error of the operating system means here."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from megacontext.errors import MemoryStoreError, ReadOnlyMemoryError, StorageFullError

FILE_MODE = 0o600
DIRECTORY_MODE = 0o700

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def storage_error(error: OSError, path: Path, action: str) -> MemoryStoreError:
    """Turns a failed system call into the error a caller can act upon.

    Args:
        error: what the operating system said.
        path: the file or directory it said it about.
        action: what was being done, as a verb ("append to").
    """
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        return StorageFullError(
            f"{path}: cannot {action}: {reason}; free some space and try again, everything "
            "committed before is still there"
        )
    if error.errno in _READ_ONLY:
        return ReadOnlyMemoryError(
            f"{path}: cannot {action}: {reason}; open the memory with mode 'r', or allow writing"
        )
    return MemoryStoreError(
        f"{path}: cannot {action}: {reason}; check the disk and its file system and try again"
    )


@contextmanager
def storing(path: Path, action: str) -> Generator[None]:
    """Raises the matching :class:`MemoryStoreError` for an ``OSError`` inside the block."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, path, action) from error


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """Writes all of ``data`` at ``offset`` bytes, through however many short writes it takes.

    Raises:
        OSError: the system call failed, or it wrote nothing at all (taken as a full disk).
    """
    done = 0
    while done < len(data):
        written = os.pwrite(descriptor, data[done:], offset + done)
        if written <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += written


def read_all(descriptor: int, n_bytes: int, offset: int) -> bytes:
    """Reads ``n_bytes`` at ``offset`` bytes; fewer only where the file ends."""
    parts: list[bytes] = []
    while n_bytes > 0:
        part = os.pread(descriptor, n_bytes, offset)
        if not part:
            break
        parts.append(part)
        n_bytes -= len(part)
        offset += len(part)
    return b"".join(parts)


def sync_directory(path: Path) -> None:
    """Makes created, renamed and removed names in ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
