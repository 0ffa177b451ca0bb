"""One writer per memory: a lock that dies with its process."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Final

from megacontext.errors import MemoryLockedError
from megacontext.memory.storage_io import FILE_MODE, read_all, storing, write_all

LOCK_NAME: Final = "lock"
_MAX_OWNER_BYTES: Final = 4096


class WriterLock:
    """Holds the right to write to a memory until released or until the process ends.

    The operating system's lock on the open file decides; the owner written into the file only
    tells people who it is, so a file left behind by a crash never blocks anybody.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, directory: Path) -> WriterLock:
        """Takes the lock of the memory at ``directory``.

        Raises:
            MemoryLockedError: another process (or another object of this one) holds it; names the
                process, its host, and since when. Or the memory was replaced at this moment.
            ReadOnlyMemoryError: the lock file cannot be written.
        """
        path = directory / LOCK_NAME
        with storing(path, "lock"):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, FILE_MODE)
        try:
            with storing(path, "lock"):
                _lock(descriptor, path)
                if not _is_still_at(descriptor, path):
                    raise MemoryLockedError(
                        f"{directory}: another process has just put a new memory in its place; "
                        "try again"
                    )
                owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
                os.ftruncate(descriptor, 0)
                write_all(descriptor, memoryview(json.dumps(owner).encode()), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor)

    def release(self) -> None:
        """Gives the lock back. The file stays: removing it would race with the next writer."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN):
            raise
        raise MemoryLockedError(
            f"{path.parent}: open for writing by {_describe_owner(descriptor)}; close it there, "
            "or open the memory with mode 'r'"
        ) from None


def _is_still_at(descriptor: int, path: Path) -> bool:
    """Whether a lock file that was waited for still is the memory's."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _describe_owner(descriptor: int) -> str:
    try:
        owner = json.loads(read_all(descriptor, _MAX_OWNER_BYTES, 0))
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(owner["started"])))
        return f"process {int(owner['pid'])} on host {owner['host']} since {started}"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "another process that has not said yet which one it is"
