"""What a damaged memory still holds beyond doubt, for a new one to be made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megacontext.errors import CorruptMemoryError
from megacontext.memory.acknowledgement import NAME as ACKNOWLEDGED_NAME
from megacontext.memory.acknowledgement import Acknowledgement
from megacontext.memory.catalog import Catalog
from megacontext.memory.catalog_rows import FileRecord, Snapshot
from megacontext.memory.ctx_file import CtxFile
from megacontext.memory.file_set import check_chunk
from megacontext.memory.identity import MemoryIdentity, SourceRecord
from megacontext.memory.resident import ResidentLimit
from megacontext.memory.verify import check_file


@dataclass(frozen=True)
class Salvage:
    """The part of a memory from which all the rest can be made.

    Args:
        identity: what the memory was made with.
        tokens: every token of it fits its checksum. The caller closes it.
        sources: in the order of their tokens.
        doubts: what cannot be vouched for, a sentence each; never tokens.
    """

    identity: MemoryIdentity
    tokens: CtxFile
    sources: tuple[SourceRecord, ...]
    doubts: tuple[str, ...]


def salvage(directory: Path, limit: ResidentLimit | None = None) -> Salvage:
    """Takes tokens and sources out of a memory whose other files may be damaged.

    Args:
        directory: the memory.
        limit: to what stays in RAM of the tokens' map.

    Raises:
        CorruptMemoryError: the tokens are damaged, or nothing proves that they are not.
        MemoryVersionError: the memory is of a newer version.
        MemoryStoreError: a file cannot be read.
    """
    try:
        note = Acknowledgement.read(directory)
    except CorruptMemoryError:
        note = None  # the catalog knows the same
    catalog = Catalog.open(directory, writable=False)
    try:
        snapshot = catalog.snapshot(tokens_only=True)
        record = _token_record(catalog, snapshot)
        problems, _ = check_file(catalog, record, snapshot.identity, directory)
        for problem in problems:
            raise CorruptMemoryError(
                f"{problem.reason}; nothing else holds these tokens",
                path=problem.path,
                level=0,
                index=problem.index,
                offset=problem.offset,
            )
        doubts = [f"sources may be wrong: {reason}" for reason in catalog.row_problems()]
        sources, lost = catalog.readable_sources(snapshot.n_tokens)
        if lost:
            doubts.append(f"{lost} sources cannot be read and are lost; their tokens are not")
        tokens = CtxFile.open(directory / record.name, length=record.length, limit=limit)
        try:
            doubts += _extend(tokens, snapshot, note)
        except BaseException:
            tokens.close()
            raise
        return Salvage(snapshot.identity, tokens, sources, tuple(doubts))
    finally:
        catalog.close()


def _token_record(catalog: Catalog, snapshot: Snapshot) -> FileRecord:
    for record in snapshot.files:
        if record.length == snapshot.n_tokens:
            return record
    raise CorruptMemoryError(
        f"it has no file with the {snapshot.n_tokens} tokens of the last commit", path=catalog.path
    )


def _extend(tokens: CtxFile, snapshot: Snapshot, note: Acknowledgement | None) -> list[str]:
    """Counts tokens that were acknowledged but which the catalog has lost, if they are whole."""
    if note is None or note.generation <= snapshot.generation:
        return []
    known = snapshot.n_tokens
    if note.n_tokens == known:
        return []
    try:
        if note.tail is None or note.tail.start > known:
            raise CorruptMemoryError("no checksum covers them", path=tokens.path)
        check_chunk(tokens, note.tail)
    except CorruptMemoryError as error:
        raise CorruptMemoryError(
            f"tokens {known} to {note.n_tokens} were acknowledged, but nothing vouches for them "
            f"({error.reason}); to go back to the first {known} tokens, delete "
            f"{ACKNOWLEDGED_NAME} beside it",
            path=tokens.path,
            level=0,
            index=known,
            offset=tokens.offset(known),
        ) from None
    tokens.extend_to(note.n_tokens)
    return [f"sources of tokens {known} to {note.n_tokens} are lost with the catalog's log"]
