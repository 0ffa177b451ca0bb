"""Reading a whole memory back and comparing it with its catalog."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megacontext.errors import CorruptMemoryError, MemoryVersionError
from megacontext.memory.catalog import Catalog, FileRecord, Snapshot
from megacontext.memory.ctx_file import CtxFile
from megacontext.memory.file_set import check_chunk, header_for
from megacontext.memory.identity import MemoryIdentity


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong.

    Args:
        path: the file.
        reason: what was found.
        level: level of the tree, where it applies.
        index: record at which the damaged stretch starts, where it applies.
        offset: byte within the file at which it starts, where it applies.
    """

    path: Path
    reason: str
    level: int | None = None
    index: int | None = None
    offset: int | None = None

    def __str__(self) -> str:
        place = ", ".join(
            f"{name} {value}"
            for name, value in (("level", self.level), ("index", self.index), ("byte", self.offset))
            if value is not None
        )
        return f"{self.path.name}{f' ({place})' if place else ''}: {self.reason}"


@dataclass(frozen=True)
class VerifyReport:
    """Outcome of a full verification.

    Args:
        problems: everything that is wrong, file by file; empty if nothing is.
        checked_bytes: bytes of ``.ctx`` files that were read and compared.
    """

    problems: tuple[Damage, ...]
    checked_bytes: int

    @property
    def ok(self) -> bool:
        """Whether the memory holds exactly what was committed."""
        return not self.problems


def verify_catalog(catalog: Catalog, directory: Path) -> VerifyReport:
    """Checks the catalog itself, then every header and every committed byte of every file.

    Goes on after damage, to tell how far it reaches. Bytes behind the committed length are no
    damage: they are a torn append, which the next writer cuts off.

    Raises:
        MemoryVersionError: a file has a version that cannot be checked.
        MemoryStoreError: a file cannot be read at all.
    """
    problems = [Damage(catalog.path, reason) for reason in catalog.integrity_problems()]
    try:
        snapshot = catalog.snapshot()
    except CorruptMemoryError as error:
        return VerifyReport((*problems, _damage(error)), 0)
    problems += _check_lengths(catalog, snapshot)
    checked = 0
    for record in snapshot.files:
        found, n_bytes = _check_file(catalog, record, snapshot.identity, directory)
        problems += found
        checked += n_bytes
    return VerifyReport(tuple(problems), checked)


def _check_lengths(catalog: Catalog, snapshot: Snapshot) -> list[Damage]:
    """Every level must have a record for each of its complete spans, and nothing else."""
    identity = snapshot.identity
    lengths = {(record.kind, record.level): record.length for record in snapshot.files}
    expected = {("tokens", 0): snapshot.n_tokens}
    level, count = 1, snapshot.n_tokens // identity.block_size
    while count:
        expected["gists", level] = expected["fidelity", level] = count
        if identity.key_width:
            expected["keys", level] = count
        level, count = level + 1, count // identity.block_size
    return [
        Damage(
            catalog.path,
            f"{place[0]} of level {place[1]} have {lengths.get(place, 0)} records in the catalog, "
            f"{snapshot.n_tokens} tokens make {expected.get(place, 0)}",
            level=place[1],
        )
        for place in sorted({*lengths, *expected})
        if lengths.get(place, 0) != expected.get(place, 0)
    ]


def _check_file(
    catalog: Catalog, record: FileRecord, identity: MemoryIdentity, directory: Path
) -> tuple[list[Damage], int]:
    path = directory / record.name
    try:
        file = CtxFile.open(path, length=0)
    except MemoryVersionError:
        raise
    except CorruptMemoryError as error:
        return [_damage(error, record.level)], 0
    try:
        expected = header_for(identity, record.kind, record.level)
        if file.header != expected:
            reason = f"the header says {file.header}, the catalog {expected}"
            return [Damage(path, reason, record.level, None, 0)], 0
        return _check_chunks(catalog, record, file)
    finally:
        file.close()


def _check_chunks(catalog: Catalog, record: FileRecord, file: CtxFile) -> tuple[list[Damage], int]:
    problems: list[Damage] = []
    checked, end = file.offset(0), 0
    for chunk in catalog.chunks(record.id):
        if chunk.start != end:
            reason = f"the catalog has no checksum for records {end} to {chunk.start}"
            problems.append(Damage(file.path, reason, record.level, end, file.offset(end)))
        end = chunk.start + chunk.count
        try:
            checked += check_chunk(file, chunk)
        except CorruptMemoryError as error:
            problems.append(_damage(error))
    return problems, checked


def _damage(error: CorruptMemoryError, level: int | None = None) -> Damage:
    return Damage(
        error.path,
        error.reason,
        level if error.level is None else error.level,
        error.index,
        error.offset,
    )
