"""Takes sources out of a memory for good, by writing it anew without them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megacontext.errors import CorruptMemoryError, InputError
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet
from megacontext.memory import Memory, SourceRecord
from megacontext.memory.exchange import aside, come_back, odd_file, remove_memory, take_place
from megacontext.memory.lock import WriterLock
from megacontext.memory.opening import check_openable, is_taken
from megacontext.memory.storage_io import storing, sync_directory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine
from megacontext.runtime.gist_builder import GistBuilder
from megacontext.runtime.ingest import Ingestor
from megacontext.telemetry import Telemetry

_CHUNK_TOKENS = 16_384
_COPIES = (".damaged", ".repaired")


@dataclass(frozen=True)
class Forgotten:
    """Outcome of forgetting.

    Args:
        sources: as they were recorded; none where an earlier call, cut off, had done all but clean
            up.
        n_tokens: tokens that the memory still has.
        copies: what lies beside the memory and may still hold the sources: damaged memories that a
            repair has kept.
    """

    sources: tuple[SourceRecord, ...]
    n_tokens: int
    copies: tuple[Path, ...]


def forget(
    base: BaseModel,
    path: Path,
    sources: Sequence[str],
    gistnet: GistNet,
    lens: LensNet | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    resident_mb: int | None = None,
) -> Forgotten:
    """Puts a memory without some of its sources in the place of the old one, which is removed.

    The new one grows beside it as ``NAME.forgetting`` from the tokens that stay: gists, keys and
    index are made as if the others had never been there. So the disk needs room for both, and
    tokens behind a source that goes get lower numbers. A call that was cut off leaves the old
    memory or the new one; the next call does the rest. Who has the memory open to read keeps
    reading the old one until it is closed.

    Args:
        base: the memory's base model.
        path: the memory's directory.
        sources: URIs as recorded, or paths of files that were taken in. All sources of a URI go.
        gistnet: makes the gists, as it made the memory's.
        lens: makes the keys, as it made the memory's.
        progress: called with the tokens done so far and with all that stay.
        resident_mb: most MiB of each memory's maps that stay in RAM, as of :meth:`.Memory.open`.

    Raises:
        InputError: the memory has no such source, or its directory holds a file that is no part of
            it; nothing has changed.
        MemoryMismatchError: the memory was made with other models.
        CorruptMemoryError: it is damaged and must be repaired before.
        MemoryNotFoundError, MemoryLockedError: there is no memory, or somebody writes to it.
        MemoryExistsError: something that is no memory lies at ``NAME.forgetting``.
        StorageFullError, MemoryStoreError: the disk failed; the old memory or the new one stands.
    """
    path = _real(path)
    growing = path.with_name(f"{path.name}.forgetting")
    lock = _lock(path)
    try:
        left = [remove_memory(rest) for rest in _left_over(path, growing)]
        expect = Engine.identity(base, gistnet, lens)
        with Memory.open(path, expect=expect, resident_mb=resident_mb) as old:
            gone = _named(old, sources, cleaned_up=any(left))
            if not gone:
                return Forgotten((), old.n_tokens, _copies(path))
            _check_whole(old)
            builder = GistBuilder(base, gistnet.to(base.device), lens)
            fresh = Memory.create(growing, old.identity, resident_mb=resident_mb)
            n_tokens = _write(old, gone, fresh, builder, progress)
        _replace(path, growing)
    finally:
        lock.release()
    return Forgotten(tuple(gone), n_tokens, _copies(path))


def _real(path: Path) -> Path:
    """The directory itself: a link to it must not be exchanged for a directory."""
    try:
        real = Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: leads nowhere ({error}); name the memory's directory") from None
    if not real.name:
        raise InputError(f"{path}: name the memory's directory")
    return real


def _lock(path: Path) -> WriterLock:
    """The right to write to the memory, wherever an exchange that was cut off has left it."""
    if is_taken(aside(path)) and not is_taken(path):
        lock = WriterLock.acquire(aside(path))
        try:
            come_back(path)
        except BaseException:
            lock.release()
            raise
        return lock
    check_openable(path, "a")
    return WriterLock.acquire(path)


def _left_over(path: Path, growing: Path) -> list[Path]:
    """All that a call may have left beside the memory."""
    drafts = [
        file
        for file in path.parent.iterdir()
        if file.name.startswith(f".{growing.name}.") and file.name.endswith(".new")
    ]
    return [growing, aside(path), *sorted(drafts)]


def _named(memory: Memory, names: Sequence[str], *, cleaned_up: bool) -> list[SourceRecord]:
    """The sources of these names; none where all of them went before a call was cut off."""
    recorded = memory.sources()
    gone: list[SourceRecord] = []
    unknown: list[str] = []
    for name in names:
        uris = {name, _file_uri(name)}
        found = [source for source in recorded if source.uri in uris]
        gone += [source for source in found if source not in gone]
        if not found:
            unknown.append(name)
    if unknown and (gone or not cleaned_up):
        raise InputError(
            f"{memory.path}: no source {', '.join(map(repr, unknown))}; `megacontext inspect` "
            "lists them all"
        )
    return sorted(gone, key=lambda source: source.start)


def _file_uri(name: str) -> str:
    """What ``megacontext ingest`` records for a file; the name itself where it can be none."""
    try:
        return Path(name).resolve().as_uri()
    except (OSError, RuntimeError, ValueError):
        return name


def _check_whole(memory: Memory) -> None:
    """Refuses a memory of which something would be lost by writing it anew."""
    odd = odd_file(memory.path)
    if odd is not None:
        raise InputError(f"{odd}: no part of the memory, which is written anew; move it")
    for problem in memory.verify().problems:
        raise CorruptMemoryError(
            f"{problem.reason}; `megacontext repair` makes the memory anew",
            path=problem.path,
            level=problem.level,
            index=problem.index,
            offset=problem.offset,
        )


def _write(
    old: Memory,
    gone: Sequence[SourceRecord],
    fresh: Memory,
    builder: GistBuilder,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Fills the new memory; returns its tokens. It is removed again if that fails."""
    total = old.n_tokens - sum(source.end - source.start for source in gone)
    try:
        with fresh:
            ingestor = Ingestor(
                builder.base, builder, fresh, Telemetry(), chunk_tokens=_CHUNK_TOKENS
            )
            for start, end in _kept(old.n_tokens, gone):
                for first in range(start, end, _CHUNK_TOKENS):
                    ingestor.append(old.tokens(first, min(end, first + _CHUNK_TOKENS)).long())
                    if progress is not None:
                        progress(fresh.n_tokens, total)
            kept = _moved(old.sources(), gone)
            if kept:
                fresh.restore_sources(kept)
            for problem in fresh.verify().problems:
                raise CorruptMemoryError(f"{problem}", path=problem.path)
    except BaseException:
        shutil.rmtree(fresh.path, ignore_errors=True)
        raise
    return total


def _kept(n_tokens: int, gone: Sequence[SourceRecord]) -> list[tuple[int, int]]:
    """Spans between the sources that go, in order."""
    edges = [0, *(edge for source in gone for edge in (source.start, source.end)), n_tokens]
    spans = zip(edges[::2], edges[1::2], strict=True)
    return [(start, end) for start, end in spans if start < end]


def _moved(sources: Sequence[SourceRecord], gone: Sequence[SourceRecord]) -> list[SourceRecord]:
    """The sources that stay, over the tokens that they have from now on."""
    kept: list[SourceRecord] = []
    for source in sources:
        if source in gone:
            continue
        shift = sum(other.end - other.start for other in gone if other.end <= source.start)
        kept.append(replace(source, start=source.start - shift, end=source.end - shift))
    return kept


def _replace(path: Path, growing: Path) -> None:
    """Lets the new memory take the old one's place, closed to other writers until that is gone."""
    lock = WriterLock.acquire(growing)
    try:
        try:
            take_place(growing, path)
        except BaseException:
            # Cut off before or after: what lies there is never the memory that stands.
            shutil.rmtree(growing, ignore_errors=True)
            raise
        with storing(path, "replace"):
            sync_directory(path.parent)
        for rest in _left_over(path, growing):
            remove_memory(rest)
    finally:
        lock.release()


def _copies(path: Path) -> tuple[Path, ...]:
    found = [
        file
        for file in path.parent.iterdir()
        if file.name.startswith(tuple(path.name + suffix for suffix in _COPIES))
    ]
    return tuple(sorted(found))
