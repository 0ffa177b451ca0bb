"""Reading a whole memory back and comparing it with its catalog."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megacontext.errors import CorruptMemoryError, MemoryVersionError
from megacontext.memory.acknowledgement import NAME as ACKNOWLEDGED_NAME
from megacontext.memory.acknowledgement import Acknowledgement
from megacontext.memory.catalog import Catalog
from megacontext.memory.catalog_rows import FileKind, FileRecord, Snapshot
from megacontext.memory.ctx_file import CtxFile
from megacontext.memory.file_set import check_chunk, header_for
from megacontext.memory.identity import MemoryIdentity
from megacontext.memory.records import expected_lengths

_ATTEMPTS: Final = 3


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
    """Checks the catalog and its sums, then every header and committed byte of every file.

    Goes on after damage, to tell how far it reaches. Bytes behind the committed length are no
    damage: they are a torn append, which the next writer cuts off.

    Raises:
        MemoryVersionError: a file has a version that cannot be checked.
        MemoryStoreError: a file cannot be read at all.
    """
    report = VerifyReport((), 0)
    for _ in range(_ATTEMPTS):
        report, generation = _verify_once(catalog, directory)
        # A rebuild meanwhile removes files that the catalog named when it was read.
        if report.ok or generation in (None, catalog.generation()):
            break
    return report


def _verify_once(catalog: Catalog, directory: Path) -> tuple[VerifyReport, int | None]:
    """A report, and the number of the commit it is about."""
    acknowledged, problems = _acknowledgement(directory)
    problems += [Damage(catalog.path, reason) for reason in catalog.integrity_problems()]
    try:
        snapshot = catalog.snapshot()
    except CorruptMemoryError as error:
        return VerifyReport((*problems, damage_of(error)), 0), None
    if acknowledged is None and not problems and snapshot.row_sum:
        problems.append(Damage(directory / ACKNOWLEDGED_NAME, "the file is missing"))
    contradiction = None if acknowledged is None else acknowledged.contradiction(snapshot)
    if contradiction is not None:
        problems.append(Damage(catalog.path, contradiction))
    problems += [Damage(catalog.path, reason, level) for level, reason in length_problems(snapshot)]
    checked = 0
    for record in snapshot.files:
        found, n_bytes = check_file(catalog, record, snapshot.identity, directory)
        problems += found
        checked += n_bytes
    return VerifyReport(tuple(problems), checked), snapshot.generation


def _acknowledgement(directory: Path) -> tuple[Acknowledgement | None, list[Damage]]:
    try:
        return Acknowledgement.read(directory), []
    except CorruptMemoryError as error:
        return None, [damage_of(error)]


def length_problems(snapshot: Snapshot) -> list[tuple[int, str]]:
    """Every level must have a record for each of its complete spans, and nothing else.

    Returns:
        Level and reason of everything that is wrong.
    """
    lengths: dict[tuple[FileKind, int], int] = {
        (file.kind, file.level): file.length for file in snapshot.files
    }
    expected = expected_lengths(snapshot.identity, snapshot.n_tokens)
    places: list[tuple[FileKind, int]] = sorted({*lengths, *expected})
    return [
        (
            place[1],
            f"{place[0]} of level {place[1]} have {lengths.get(place, 0)} records in the catalog, "
            f"{snapshot.n_tokens} tokens make {expected.get(place, 0)}",
        )
        for place in places
        if lengths.get(place, 0) != expected.get(place, 0)
    ]


def check_file(
    catalog: Catalog, record: FileRecord, identity: MemoryIdentity, directory: Path
) -> tuple[list[Damage], int]:
    """Compares a file with its checksums.

    Returns:
        Everything that is wrong with it, and the bytes that were read.

    Raises:
        MemoryVersionError: it has a version that cannot be checked.
    """
    path = directory / record.name
    try:
        file = CtxFile.open(path, length=0)
    except MemoryVersionError:
        raise
    except CorruptMemoryError as error:
        return [damage_of(error, record.level)], 0
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
            problems.append(damage_of(error))
    return problems, checked


def damage_of(error: CorruptMemoryError, level: int | None = None) -> Damage:
    """What an error says is wrong."""
    return Damage(
        error.path,
        error.reason,
        level if error.level is None else error.level,
        error.index,
        error.offset,
    )
