"""What the catalog's rows say, checked value by value: SQLite lets any column hold anything."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

from megacontext.errors import ConfigError, CorruptMemoryError
from megacontext.memory.identity import GistDtype, MemoryIdentity, Source, SourceRecord

FileKind = Literal["tokens", "gists", "keys", "fidelity"]

SOURCE_COLUMNS: Final = (
    "id, uri, media_type, sha256, author, created, tags, start_token, end_token, ingested_at"
)

UNFINISHED: Final = "unfinished_sources"
"""Row of ``meta`` with the numbers of incomplete sources, a JSON list; there may be none."""

_PREFIXES: Final[dict[FileKind, str]] = {
    "tokens": "",
    "gists": "",
    "keys": "keys.",
    "fidelity": "fidelity.",
}
_MAX_LEVEL: Final = 0xFFFF
_SHOWN: Final = 40


@dataclass(frozen=True)
class Chunk:
    """Checksum of ``count`` consecutive records of one file, from ``start`` on."""

    start: int
    count: int
    crc32: int


@dataclass(frozen=True)
class FileRecord:
    """A file as the catalog knows it.

    Args:
        id: its row.
        name: its name within the memory's directory.
        kind: what its records are.
        level: level of the tree.
        length: committed records.
        tail: its last chunk; ``None`` for an empty file.
    """

    id: int
    name: str
    kind: FileKind
    level: int
    length: int
    tail: Chunk | None


@dataclass(frozen=True)
class FileUpdate:
    """What a commit changes about one file.

    Args:
        id: its row; ``None`` for a file that is new.
        name: its name.
        kind: what its records are.
        level: level of the tree.
        length: records it has from now on.
        chunks: new chunks, and the former last one where it has grown.
    """

    id: int | None
    name: str
    kind: FileKind
    level: int
    length: int
    chunks: Sequence[Chunk]


@dataclass(frozen=True)
class SourceRange:
    """Tokens ``start`` to ``end`` come from a source; ``new``: not in the catalog yet; ``more``:
    others of its tokens are to follow.
    """

    id: int
    source: Source
    start: int
    end: int
    new: bool
    more: bool = False


@dataclass(frozen=True)
class Snapshot:
    """One commit, as it is read back; ``row_sum`` is empty in a catalog that has none yet."""

    generation: int
    n_tokens: int
    identity: MemoryIdentity
    files: tuple[FileRecord, ...]
    row_sum: str

    @property
    def token_tail(self) -> Chunk | None:
        """The last chunk of the tokens."""
        return next((record.tail for record in self.files if record.kind == "tokens"), None)


def file_name(kind: FileKind, level: int, generation: int = 0) -> str:
    """Name of a level's file; one that a rebuild wrote carries the generation it came with."""
    suffix = f".g{generation}" if generation else ""
    return f"{_PREFIXES[kind]}L{level}{suffix}.ctx"


def read_identity(meta: Mapping[str, Any], path: Path) -> MemoryIdentity:
    """The identity in the catalog's ``meta`` table.

    Raises:
        CorruptMemoryError: a value is missing or makes no sense.
    """
    try:
        return MemoryIdentity(
            base_model=meta["base_model"],
            tokenizer_hash=meta["tokenizer_hash"],
            gist_version=meta["gist_version"],
            block_size=int(meta["block_size"]),
            gist_width=int(meta["gist_width"]),
            key_width=int(meta["key_width"]),
            gist_dtype=cast(GistDtype, meta["gist_dtype"]),
        )
    except (KeyError, ValueError, TypeError, ConfigError) as error:
        raise CorruptMemoryError(
            f"the catalog's identity cannot be read: {error}", path=path
        ) from None


def read_chunk(row: Sequence[Any], path: Path) -> Chunk:
    """``start, count, crc32`` of a chunk.

    Raises:
        CorruptMemoryError: one of them is no number that it can be.
    """
    start, count, crc32 = (integer(value, "checksum", path) for value in row)
    return Chunk(start, count, crc32)


def read_file(row: Sequence[Any], path: Path) -> FileRecord:
    """``id, name, kind, level, length`` of a file, then its last chunk.

    Raises:
        CorruptMemoryError: a value makes no sense, or they contradict each other.
    """
    file_id, name, kind, level, length, *tail_row = row
    if kind not in _PREFIXES:
        raise CorruptMemoryError(f"the catalog has files of kind {_shown(kind)}", path=path)
    level = integer(level, "level of a file", path)
    pattern = re.escape(f"{_PREFIXES[kind]}L{level}") + r"(?:\.g[0-9]{1,18})?\.ctx"
    if level > _MAX_LEVEL or not isinstance(name, str) or not re.fullmatch(pattern, name):
        raise CorruptMemoryError(
            f"the catalog names an odd file, {_shown(name)}, for {kind} of level {level}", path=path
        )
    length = integer(length, f"length of {name}", path)
    tail = read_chunk(tail_row, path) if tail_row[0] is not None else None
    if length != (tail.start + tail.count if tail is not None else 0):
        raise CorruptMemoryError(
            f"the catalog's length of {name} ({length}) is not where its chunks end",
            path=path,
            level=level,
        )
    return FileRecord(integer(file_id, "file", path), name, kind, level, length, tail)


def read_unfinished(value: Any, path: Path) -> frozenset[int]:
    """Numbers of the incomplete sources, from the value of the row :data:`UNFINISHED`.

    Args:
        value: ``None`` where there is no such row.
        path: the catalog.

    Raises:
        CorruptMemoryError: it is no list of numbers.
    """
    try:
        found = json.loads(value) if isinstance(value, str) else [] if value is None else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise CorruptMemoryError(
            f"the catalog's list of incomplete sources is {_shown(value)}", path=path
        )
    numbers = cast(list[Any], found)
    return frozenset(integer(number, "incomplete source", path) for number in numbers)


def read_source(
    row: Sequence[Any], n_tokens: int, path: Path, unfinished: Collection[int] = ()
) -> SourceRecord:
    """:data:`SOURCE_COLUMNS` of a source, of which ``n_tokens`` tokens of the memory count.

    Args:
        row: the columns.
        n_tokens: tokens of the memory.
        path: the catalog.
        unfinished: numbers of the incomplete sources.

    Raises:
        CorruptMemoryError: a value makes no sense.
    """
    source_id, uri, media_type, sha256, author, created, tags, start, end, ingested_at = row
    texts = (uri, media_type, sha256, author, tags)
    try:
        labels = json.loads(tags) if all(isinstance(text, str) for text in texts) else None
    except (ValueError, RecursionError):
        labels = None
    start, end = integer(start, "start of a source", path), integer(end, "end of a source", path)
    times = (ingested_at, 0.0 if created is None else created)
    if (
        not isinstance(labels, list)
        or not all(isinstance(label, str) for label in cast(list[object], labels))
        or not all(isinstance(time, float) and math.isfinite(time) for time in times)
        or end <= start
    ):
        raise CorruptMemoryError(
            f"the catalog's source {_shown(source_id)} makes no sense", path=path
        )
    return SourceRecord(
        uri=uri,
        media_type=media_type,
        sha256=sha256,
        author=author,
        created=created,
        tags=tuple(cast(list[str], labels)),
        id=integer(source_id, "source", path),
        start=start,
        end=min(end, n_tokens),
        ingested_at=ingested_at,
        complete=source_id not in unfinished and end <= n_tokens,
    )


def integer(value: Any, what: str, path: Path) -> int:
    """A number that counts something.

    Raises:
        CorruptMemoryError: it is none.
    """
    if not isinstance(value, int) or value < 0:
        raise CorruptMemoryError(f"the catalog's {what} is {_shown(value)}", path=path)
    return value


def _shown(value: Any) -> str:
    text = repr(value[:_SHOWN] if isinstance(value, str | bytes) else value)
    return text if len(text) <= 2 * _SHOWN else f"{text[: 2 * _SHOWN]}…"
