"""Makes a damaged memory anew from its tokens: gists, keys and lexical index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from megacontext.errors import (
    CorruptMemoryError,
    InputError,
    MemoryExistsError,
    MemoryMismatchError,
)
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet
from megacontext.memory import Memory, MemoryIdentity
from megacontext.memory.lock import WriterLock
from megacontext.memory.opening import check_openable, is_taken
from megacontext.memory.resident import ResidentLimit
from megacontext.memory.salvage import Salvage, salvage
from megacontext.memory.storage_io import storing, sync_directory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine
from megacontext.runtime.gist_builder import GistBuilder
from megacontext.runtime.ingest import Ingestor
from megacontext.telemetry import Telemetry

_CHUNK_TOKENS = 16_384


@dataclass(frozen=True)
class Repaired:
    """Outcome of a repair.

    Args:
        n_tokens: tokens of the memory, all of them proven by their checksums.
        damaged: where the damaged memory lies now.
        doubts: what could not be vouched for, a sentence each.
    """

    n_tokens: int
    damaged: Path
    doubts: tuple[str, ...]


def repair(
    base: BaseModel,
    path: Path,
    gistnet: GistNet,
    lens: LensNet | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    resident_mb: int | None = None,
) -> Repaired:
    """Puts a new memory with the same tokens and sources in the place of a damaged one.

    The new one grows beside it as ``NAME.repaired``; the damaged one is never changed, only renamed
    at the end. So the disk needs room for both.

    Args:
        base: the memory's base model.
        path: the memory's directory.
        gistnet: makes the gists; another one than before may do so.
        lens: makes the keys, if any.
        progress: called with the tokens done so far and with all of them.
        resident_mb: most MiB of each memory's maps that stay in RAM, as of :meth:`.Memory.open`.

    Raises:
        CorruptMemoryError: the tokens are damaged, or nothing proves that they are not.
        MemoryMismatchError: they were made by another tokenizer or base model.
        MemoryNotFoundError, MemoryLockedError: there is no memory, or somebody writes to it.
        MemoryExistsError: an earlier repair was cut off; its folder is in the way.
        StorageFullError, MemoryStoreError: the disk failed; the damaged memory is as it was.
    """
    path = Path(path)
    if not path.name:
        raise InputError(f"{path}: name the memory's directory")
    check_openable(path, "a")
    lock = WriterLock.acquire(path)
    try:
        saved = salvage(path, ResidentLimit.of(resident_mb))
        try:
            identity = Engine.identity(base, gistnet, lens)
            doubts = [*saved.doubts, *_differences(path, saved.identity, identity)]
            fresh = path.with_name(f"{path.name}.repaired")
            identity = replace(identity, gist_dtype=saved.identity.gist_dtype)
            memory = _create(fresh, identity, resident_mb)
            with memory:
                builder = GistBuilder(base, gistnet.to(base.device), lens)
                ingestor = Ingestor(base, builder, memory, Telemetry(), chunk_tokens=_CHUNK_TOKENS)
                _fill(ingestor, saved, progress)
                for problem in memory.verify().problems:
                    raise CorruptMemoryError(f"{problem}", path=problem.path)
        finally:
            saved.tokens.close()
        damaged = _free_name(path)
        with storing(path, "rename"):
            path.rename(damaged)
            fresh.rename(path)
            sync_directory(path.absolute().parent)
    finally:
        lock.release()
    return Repaired(saved.tokens.length, damaged, tuple(doubts))


def _create(fresh: Path, identity: MemoryIdentity, resident_mb: int | None) -> Memory:
    try:
        return Memory.create(fresh, identity, resident_mb=resident_mb)
    except MemoryExistsError:
        raise MemoryExistsError(
            f"{fresh}: left by a repair that was cut off; remove it and repair again"
        ) from None


def _fill(ingestor: Ingestor, saved: Salvage, progress: Callable[[int, int], None] | None) -> None:
    total = saved.tokens.length
    for start in range(0, total, _CHUNK_TOKENS):
        stop = min(total, start + _CHUNK_TOKENS)
        ingestor.append(saved.tokens.map(start, stop).long())
        if progress is not None:
            progress(stop, total)
    if saved.sources:
        ingestor.memory.restore_sources(saved.sources)


def _differences(path: Path, old: MemoryIdentity, new: MemoryIdentity) -> list[str]:
    """What the new memory is made with that the old one was not; only gists may differ."""
    for name in ("tokenizer_hash", "base_model", "block_size"):
        have, expected = getattr(old, name), getattr(new, name)
        if have != expected:
            raise MemoryMismatchError(
                f"{path}: {name} is {have!r}, expected {expected!r}; name the model that it was "
                "made with, --set model=…"
            )
    return [
        f"{name} was {getattr(old, name)!r} and is {getattr(new, name)!r}"
        for name in ("gist_version", "gist_width", "key_width")
        if getattr(old, name) != getattr(new, name)
    ]


def _free_name(path: Path) -> Path:
    """A name for the damaged memory that nothing has yet."""
    number = 1
    while True:
        damaged = path.with_name(f"{path.name}.damaged{number if number > 1 else ''}")
        if not is_taken(damaged):
            return damaged
        number += 1
