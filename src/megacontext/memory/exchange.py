"""Putting one memory in the place of another, so that a crash leaves one of them there."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import os
import shutil
import sys
from pathlib import Path
from typing import Final

from megacontext.errors import MemoryExistsError
from megacontext.memory.acknowledgement import NAME as ACKNOWLEDGED_NAME
from megacontext.memory.key_index_file import INDEX_NAME
from megacontext.memory.lock import LOCK_NAME
from megacontext.memory.opening import is_taken
from megacontext.memory.schema import CATALOG_NAME
from megacontext.memory.storage_io import storing, sync_directory

_NO_DIRECTORY: Final = -100  # AT_FDCWD: paths stand for themselves
_EXCHANGE: Final = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_UNSUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
_OURS: Final = (
    "*.ctx",
    f"{CATALOG_NAME}*",
    f"{INDEX_NAME}*",
    LOCK_NAME,
    ACKNOWLEDGED_NAME,
)


def aside(path: Path) -> Path:
    """Where the old memory lies for a moment on a file system that cannot exchange two names."""
    return path.with_name(f"{path.name}.forgotten")


def take_place(new: Path, path: Path) -> None:
    """Gives a new memory the name of another, which lies at ``new`` or :func:`aside` afterwards.

    Nobody may have either of them open. Both names are exchanged in one step where the file system
    can; elsewhere a crash may leave the old memory at :func:`aside` and none at ``path``, which
    :func:`come_back` mends.

    Raises:
        MemoryStoreError: the directories cannot be renamed; both are where they were.
    """
    with storing(path, "replace"):
        try:
            _exchange(new.absolute(), path.absolute())
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            try:
                path.rename(aside(path))
                new.rename(path)
            except BaseException:
                come_back(path)
                raise


def come_back(path: Path) -> None:
    """Gives the old memory its name back where :func:`take_place` was cut off between two steps.

    Raises:
        MemoryStoreError: it cannot be renamed.
    """
    if is_taken(aside(path)) and not is_taken(path):
        with storing(path, "bring back"):
            aside(path).rename(path)


def remove_memory(path: Path) -> bool:
    """Removes what a memory, or a part of one, has left at a path.

    Returns:
        Whether there was anything.

    Raises:
        MemoryExistsError: something else than a memory lies there.
        MemoryStoreError: it cannot be removed.
    """
    if not is_taken(path):
        return False
    with storing(path, "remove"):
        if path.is_symlink() or not path.is_dir() or odd_file(path) is not None:
            raise MemoryExistsError(f"{path}: no memory, and in the way of one; move it elsewhere")
        shutil.rmtree(path)
        sync_directory(path.absolute().parent)
    return True


def odd_file(path: Path) -> Path | None:
    """A file in a memory's directory that is no part of it; ``None`` if there is none."""
    return next((file for file in sorted(path.iterdir()) if not _is_ours(file)), None)


def _is_ours(file: Path) -> bool:
    return any(fnmatch.fnmatchcase(file.name, pattern) for pattern in _OURS)


def _exchange(first: Path, second: Path) -> None:
    """Swaps two absolute paths in one step.

    Raises:
        OSError: as the system says, or ``ENOSYS`` where it has no such call.
    """
    system = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(first), os.fsencode(second))
    try:
        if sys.platform == "darwin":
            status = system.renamex_np(*names, _EXCHANGE)
        else:
            status = system.renameat2(_NO_DIRECTORY, names[0], _NO_DIRECTORY, names[1], _EXCHANGE)
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
