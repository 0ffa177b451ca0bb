"""Making the directory of a memory, and opening what its last commit names."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

from megacontext.errors import (
    CorruptMemoryError,
    InputError,
    MemoryExistsError,
    MemoryMismatchError,
    MemoryNotFoundError,
    MemoryStoreError,
    ReadOnlyMemoryError,
)
from megacontext.memory.acknowledgement import Acknowledgement
from megacontext.memory.catalog import Catalog
from megacontext.memory.catalog_rows import Snapshot, file_name
from megacontext.memory.ctx_file import CtxFile
from megacontext.memory.file_set import FileSet, header_for
from megacontext.memory.identity import MemoryIdentity
from megacontext.memory.schema import CATALOG_NAME
from megacontext.memory.storage_io import storing, sync_directory
from megacontext.memory.verify import length_problems

_TOKEN_FILE: Final = file_name("tokens", 0)


def create_directory(target: Path, identity: MemoryIdentity) -> None:
    """Makes an empty memory, completely or not at all.

    Raises:
        MemoryExistsError: something lies at ``target`` already.
        StorageFullError, ReadOnlyMemoryError, MemoryStoreError: it cannot be written.
    """
    exists = MemoryExistsError(
        f"{target}: something is there already; open it, or choose another path"
    )
    if is_taken(target):
        raise exists
    # Built under another name, so that no crash leaves half a memory under this one.
    with storing(target, "create"):
        target.parent.mkdir(parents=True, exist_ok=True)
        # A process that was killed may have left a draft, and its number may be ours by now.
        draft = Path(mkdtemp(prefix=f".{target.name}.", suffix=".new", dir=target.parent))
    try:
        tokens = CtxFile.create(draft / _TOKEN_FILE, header_for(identity, "tokens", 0))
        try:
            tokens.fsync()
        finally:
            tokens.close()
        empty = Catalog.create(draft, identity, _TOKEN_FILE)
        Acknowledgement.of(empty).write(draft, durable=True)
        with storing(target, "create"):
            sync_directory(draft)
            if is_taken(target):
                raise exists
            draft.rename(target)
            sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def is_taken(path: Path) -> bool:
    """Whether anything lies at a path, be it a link to nothing.

    Raises:
        MemoryStoreError: the path cannot be looked at.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise MemoryStoreError(
            f"{path}: cannot be looked at: {reason}; check the path and who may read it"
        ) from None
    return True


def check_openable(directory: Path, mode: str) -> None:
    """Refuses a path or mode with which nothing can be opened.

    Raises:
        InputError: ``mode`` is neither ``"r"`` nor ``"a"``.
        MemoryNotFoundError: there is no memory.
        CorruptMemoryError: there are tokens, but no catalog.
        MemoryStoreError: the directory cannot be looked into.
        ReadOnlyMemoryError: ``mode`` is ``"a"`` and the directory cannot be written to.
    """
    if mode not in ("r", "a"):
        raise InputError(f"{directory}: mode is {mode!r}, allowed are 'r' and 'a'")
    if not is_taken(directory / CATALOG_NAME):
        if is_taken(directory / _TOKEN_FILE):
            raise CorruptMemoryError("the file is missing", path=directory / CATALOG_NAME)
        raise MemoryNotFoundError(
            f"{directory}: there is no memory here; check the path, or make one with "
            "`megacontext ingest`"
        )
    if mode == "a" and not os.access(directory, os.W_OK):
        raise ReadOnlyMemoryError(
            f"{directory}: writing is not allowed; open the memory with mode 'r', or allow writing"
        )


def acknowledged(directory: Path) -> Acknowledgement | None:
    """The note of the last commit; ``None`` where there is none that can be read."""
    try:
        return Acknowledgement.read(directory)
    except MemoryStoreError:
        return None  # `verify` tells; on its own it takes nothing away


def acknowledge(directory: Path, snapshot: Snapshot) -> None:
    """Notes a commit that the caller is going to be told of."""
    # The commit stands whether or not it can be noted; an older note only notices less.
    with contextlib.suppress(MemoryStoreError):
        Acknowledgement.of(snapshot).write(directory)


def show_latest(
    catalog: Catalog,
    files: FileSet,
    directory: Path,
    expect: MemoryIdentity | None,
    note: Acknowledgement | None = None,
) -> Snapshot:
    """Reads the last commit and opens its files.

    Args:
        catalog: the memory's.
        files: opened or extended.
        directory: the memory.
        expect: what the memory must have been made with.
        note: an acknowledged commit, read before.

    Raises:
        MemoryMismatchError: its identity is not ``expect``.
        CorruptMemoryError: its files do not hold what it says, or it is older than ``note``.
    """
    while True:
        snapshot = catalog.snapshot()
        contradiction = None if note is None else note.contradiction(snapshot)
        if contradiction is not None:
            raise CorruptMemoryError(contradiction, path=catalog.path)
        difference = snapshot.identity.explain_difference(expect) if expect is not None else None
        if difference is not None:
            raise MemoryMismatchError(f"{directory}: {difference}")
        for level, reason in length_problems(snapshot):
            raise CorruptMemoryError(reason, path=catalog.path, level=level)
        try:
            files.load(snapshot, check_tails=True)
        except CorruptMemoryError:
            # A rebuild may have removed the files between the two steps.
            if catalog.generation() == snapshot.generation:
                raise
        else:
            return snapshot
