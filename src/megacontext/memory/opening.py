"""Making the directory of a memory, and opening what its last commit names."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from megacontext.errors import (
    CorruptMemoryError,
    InputError,
    MemoryExistsError,
    MemoryMismatchError,
    MemoryNotFoundError,
    ReadOnlyMemoryError,
)
from megacontext.memory.catalog import Catalog, Snapshot
from megacontext.memory.ctx_file import CtxFile
from megacontext.memory.file_set import FileSet, file_name, header_for
from megacontext.memory.identity import MemoryIdentity
from megacontext.memory.records import span_count
from megacontext.memory.schema import CATALOG_NAME
from megacontext.memory.storage_io import DIRECTORY_MODE, storing, sync_directory

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
    if target.exists() or target.is_symlink():
        raise exists
    # Built under another name, so that no crash leaves half a memory under this one.
    draft = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        with storing(target, "create"):
            target.parent.mkdir(parents=True, exist_ok=True)
            draft.mkdir(mode=DIRECTORY_MODE)
        tokens = CtxFile.create(draft / _TOKEN_FILE, header_for(identity, "tokens", 0))
        try:
            tokens.fsync()
        finally:
            tokens.close()
        Catalog.create(draft, identity, _TOKEN_FILE)
        with storing(target, "create"):
            sync_directory(draft)
            if target.exists():
                raise exists
            draft.rename(target)
            sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def check_openable(directory: Path, mode: str) -> None:
    """Refuses a path or mode with which nothing can be opened.

    Raises:
        InputError: ``mode`` is neither ``"r"`` nor ``"a"``.
        MemoryNotFoundError: there is no memory.
        CorruptMemoryError: there are tokens, but no catalog.
        ReadOnlyMemoryError: ``mode`` is ``"a"`` and the directory cannot be written to.
    """
    if mode not in ("r", "a"):
        raise InputError(f"{directory}: mode is {mode!r}, allowed are 'r' and 'a'")
    if not (directory / CATALOG_NAME).exists():
        if (directory / _TOKEN_FILE).exists():
            raise CorruptMemoryError("the file is missing", path=directory / CATALOG_NAME)
        raise MemoryNotFoundError(
            f"{directory}: there is no memory here; check the path, or make one with "
            "`megacontext ingest`"
        )
    if mode == "a" and not os.access(directory, os.W_OK):
        raise ReadOnlyMemoryError(
            f"{directory}: writing is not allowed; open the memory with mode 'r', or allow writing"
        )


def show_latest(
    catalog: Catalog, files: FileSet, directory: Path, expect: MemoryIdentity | None
) -> Snapshot:
    """Reads the last commit and opens its files.

    Raises:
        MemoryMismatchError: its identity is not ``expect``.
        CorruptMemoryError: its files do not hold what it says.
    """
    while True:
        snapshot = catalog.snapshot()
        difference = snapshot.identity.explain_difference(expect) if expect is not None else None
        if difference is not None:
            raise MemoryMismatchError(f"{directory}: {difference}")
        try:
            files.load(snapshot, check_tails=True)
        except CorruptMemoryError:
            # A rebuild may have removed the files between the two steps.
            if catalog.generation() == snapshot.generation:
                raise
        else:
            _check_lengths(snapshot, directory)
            return snapshot


def _check_lengths(snapshot: Snapshot, directory: Path) -> None:
    for record in snapshot.files:
        expected = span_count(snapshot.n_tokens, snapshot.identity.block_size, record.level)
        if record.length != expected:
            raise CorruptMemoryError(
                f"the catalog has {record.length} records of it, {snapshot.n_tokens} tokens make "
                f"{expected}",
                path=directory / record.name,
                level=record.level,
            )
