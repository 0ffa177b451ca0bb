"""The catalog: the commit point of a memory, and its account of every file, chunk and source."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

from megacontext.errors import ConfigError, CorruptMemoryError, MemoryVersionError
from megacontext.memory.identity import GistDtype, MemoryIdentity, Source, SourceRecord
from megacontext.memory.lexical_index import LexicalIndex
from megacontext.memory.schema import (
    CATALOG_NAME,
    FORMAT_VERSION,
    connect,
    create_tables,
    primary_code,
    sqlite_errors,
)

FileKind = Literal["tokens", "gists", "keys", "fidelity"]

_FILE_NAME: Final = re.compile(r"(?:(?:keys|fidelity)\.)?L\d{1,5}(?:\.g\d{1,18})?\.ctx")
_SOURCE_COLUMNS: Final = (
    "id, uri, media_type, sha256, author, created, tags, start_token, end_token, ingested_at"
)


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
    """Tokens ``start`` to ``end`` come from a source; ``new``: not in the catalog yet."""

    id: int
    source: Source
    start: int
    end: int
    new: bool


@dataclass(frozen=True)
class Snapshot:
    """One commit, as it is read back."""

    generation: int
    n_tokens: int
    identity: MemoryIdentity
    files: tuple[FileRecord, ...]


class Catalog:
    """``catalog.sqlite`` of one memory. One writer, any number of readers."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.lexical = LexicalIndex(connection, path)
        self._connection = connection
        self._commit_attempted = False

    @classmethod
    def create(cls, directory: Path, identity: MemoryIdentity, token_file: str) -> None:
        """Makes the catalog of an empty memory."""
        path = directory / CATALOG_NAME
        connection = create_tables(path)
        try:
            with sqlite_errors(path, "create"):
                connection.execute("BEGIN")
                connection.executemany("INSERT INTO meta VALUES (?, ?)", _meta_rows(identity))
                connection.execute("INSERT INTO commits VALUES (0, 0, ?)", (time.time(),))
                connection.execute(
                    "INSERT INTO files (name, kind, level, length, generation) "
                    "VALUES (?, 'tokens', 0, 0, 0)",
                    (token_file,),
                )
                connection.execute("COMMIT")
        finally:
            connection.close()

    @classmethod
    def open(cls, directory: Path, *, writable: bool) -> Catalog:
        """Opens an existing catalog.

        Raises:
            CorruptMemoryError: the file is no catalog.
            MemoryVersionError: it is one of a newer version.
        """
        path = directory / CATALOG_NAME
        catalog = cls(path, connect(path, writable=writable))
        try:
            catalog._check_version()
        except BaseException:
            catalog.close()
            raise
        return catalog

    def snapshot(self) -> Snapshot:
        """The last commit: lengths, files and identity, all of the same moment.

        Raises:
            CorruptMemoryError: the tables contradict each other.
        """
        with sqlite_errors(self.path, "read"), self._reading():
            execute = self._connection.execute
            identity = self._read_identity(dict(execute("SELECT key, value FROM meta").fetchall()))
            commit = execute(
                "SELECT generation, n_tokens FROM commits ORDER BY generation DESC LIMIT 1"
            ).fetchone()
            rows = execute(
                "SELECT id, name, kind, level, length, start, count, crc32 FROM files "
                "LEFT JOIN chunks ON file_id = id AND start = "
                "(SELECT max(start) FROM chunks WHERE file_id = files.id) ORDER BY level, kind"
            ).fetchall()
        if commit is None:
            raise CorruptMemoryError("the catalog has no commit", path=self.path)
        files = tuple(self._file_record(row) for row in rows)
        return Snapshot(commit[0], commit[1], identity, files)

    def generation(self) -> int:
        """Number of the last commit."""
        with sqlite_errors(self.path, "read"):
            row = self._connection.execute("SELECT max(generation) FROM commits").fetchone()
        return int(row[0])

    def commit_append(
        self,
        generation: int,
        n_tokens: int,
        files: Iterable[FileUpdate],
        *,
        texts: Sequence[str] = (),
        first_block: int = 0,
        source: SourceRange | None = None,
    ) -> None:
        """Records one append; afterwards it has happened.

        Args:
            generation: number of this commit.
            n_tokens: tokens of the memory from now on.
            files: files that have grown.
            texts: texts of the blocks from ``first_block`` on, for the lexical index.
            first_block: block of the first text.
            source: where the tokens come from.

        Raises:
            StorageFullError, MemoryStoreError: nothing was recorded, call :meth:`roll_back`.
        """
        with self._writing() as connection:
            _add_commit(connection, generation, n_tokens)
            for update in files:
                _update_file(connection, update, generation)
            if source is not None:
                _update_source(connection, source, generation)
            self.lexical.add(first_block, texts)

    def commit_replacement(
        self, generation: int, n_tokens: int, identity: MemoryIdentity, files: Iterable[FileUpdate]
    ) -> None:
        """Puts new gist, key and fidelity files, and their identity, in the place of the old."""
        with self._writing() as connection:
            _add_commit(connection, generation, n_tokens)
            connection.execute("DELETE FROM files WHERE kind <> 'tokens'")
            for update in files:
                _update_file(connection, update, generation)
            connection.executemany("REPLACE INTO meta VALUES (?, ?)", _meta_rows(identity))

    def roll_back(self) -> int:
        """Undoes an unfinished transaction.

        A commit that failed while it was synced may have left a complete record in the log, which
        the next process would take for committed. Another, harmless transaction overwrites it.

        Returns:
            The generation the catalog now has.

        Raises:
            MemoryStoreError: it is not certain what the next process would see.
        """
        with sqlite_errors(self.path, "roll back"):
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            if self._commit_attempted:
                self._connection.execute("BEGIN IMMEDIATE")
                self._connection.execute(
                    "UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = 'roll_backs'"
                )
                self._connection.execute("COMMIT")
                self._commit_attempted = False
        return self.generation()

    def chunks(self, file_id: int) -> list[Chunk]:
        """All chunks of a file, in order."""
        with sqlite_errors(self.path, "read"):
            rows = self._connection.execute(
                "SELECT start, count, crc32 FROM chunks WHERE file_id = ? ORDER BY start",
                (file_id,),
            ).fetchall()
        return [Chunk(*row) for row in rows]

    def sources(self, n_tokens: int) -> list[SourceRecord]:
        """Sources that start within the first ``n_tokens`` tokens, oldest first."""
        with sqlite_errors(self.path, "read"):
            rows = self._connection.execute(
                f"SELECT {_SOURCE_COLUMNS} FROM sources WHERE start_token < ? "  # noqa: S608
                "ORDER BY start_token",
                (n_tokens,),
            ).fetchall()
        return [_source_record(row, n_tokens) for row in rows]

    def source_at(self, token: int, n_tokens: int) -> SourceRecord | None:
        """The source of one token, or ``None``."""
        with sqlite_errors(self.path, "read"):
            row = self._connection.execute(
                f"SELECT {_SOURCE_COLUMNS} FROM sources WHERE start_token <= ? "  # noqa: S608
                "ORDER BY start_token DESC LIMIT 1",
                (token,),
            ).fetchone()
        record = _source_record(row, n_tokens) if row is not None else None
        return record if record is not None and token < record.end else None

    def source(self, source_id: int) -> SourceRecord | None:
        """A source by its number, or ``None``."""
        with sqlite_errors(self.path, "read"):
            row = self._connection.execute(
                f"SELECT {_SOURCE_COLUMNS} FROM sources WHERE id = ?",  # noqa: S608
                (source_id,),
            ).fetchone()
        return _source_record(row, row[8]) if row is not None else None

    def count_sources(self, n_tokens: int) -> int:
        """Number of sources that start within the first ``n_tokens`` tokens."""
        with sqlite_errors(self.path, "read"):
            return self._connection.execute(
                "SELECT count(*) FROM sources WHERE start_token < ?", (n_tokens,)
            ).fetchone()[0]

    def max_source_id(self) -> int:
        """The highest number given to a source so far; 0 if there is none."""
        with sqlite_errors(self.path, "read"):
            row = self._connection.execute("SELECT coalesce(max(id), 0) FROM sources").fetchone()
        return int(row[0])

    def integrity_problems(self) -> list[str]:
        """What SQLite itself finds wrong with the database."""
        with sqlite_errors(self.path, "check"):
            found = [row[0] for row in self._connection.execute("PRAGMA integrity_check")]
            orphans = self._connection.execute("PRAGMA foreign_key_check").fetchall()
        problems = [str(line) for line in found if line != "ok"]
        problems += [f"table {row[0]}, row {row[1]}: refers to nothing" for row in orphans]
        return problems

    def stored_bytes(self) -> int:
        """Size of the database on disk, its log included, in bytes."""
        names = (self.path.name, f"{self.path.name}-wal")
        paths = [self.path.with_name(name) for name in names]
        return sum(path.stat().st_size for path in paths if path.exists())

    def close(self) -> None:
        """Closes the connection; the writer's also folds the log into the database."""
        with sqlite_errors(self.path, "close"):
            self._connection.close()

    @contextmanager
    def _reading(self) -> Generator[None]:
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("COMMIT")

    @contextmanager
    def _writing(self) -> Generator[sqlite3.Connection]:
        with sqlite_errors(self.path, "commit to"):
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection
            self._commit_attempted = True
            try:
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                # A log that could not even be written to the end has no valid commit record.
                self._commit_attempted = primary_code(error) != sqlite3.SQLITE_FULL
                raise
            self._commit_attempted = False

    def _check_version(self) -> None:
        with sqlite_errors(self.path, "open"):
            row = self._connection.execute(
                "SELECT value FROM meta WHERE key = 'format_version'"
            ).fetchone()
        if row is None or not str(row[0]).isdecimal():
            raise CorruptMemoryError("the catalog has no format version", path=self.path)
        if int(row[0]) != FORMAT_VERSION:
            raise MemoryVersionError(
                f"{self.path.parent}: memory format {row[0]}, this MegaContext reads format "
                f"{FORMAT_VERSION}; use the version of MegaContext that wrote it, or a newer one"
            )

    def _read_identity(self, meta: dict[str, str]) -> MemoryIdentity:
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
        except (KeyError, ValueError, ConfigError) as error:
            raise CorruptMemoryError(
                f"the catalog's identity cannot be read: {error}", path=self.path
            ) from None

    def _file_record(self, row: tuple[Any, ...]) -> FileRecord:
        file_id, name, kind, level, length, start, count, crc32 = row
        if not _FILE_NAME.fullmatch(name):
            raise CorruptMemoryError(f"the catalog names an odd file, {name!r}", path=self.path)
        tail = Chunk(start, count, crc32) if start is not None else None
        if length != (tail.start + tail.count if tail is not None else 0):
            raise CorruptMemoryError(
                f"the catalog's length of {name} ({length}) is not where its chunks end",
                path=self.path,
                level=level,
            )
        return FileRecord(file_id, name, cast(FileKind, kind), level, length, tail)


def _meta_rows(identity: MemoryIdentity) -> list[tuple[str, str]]:
    rows = {
        "format_version": FORMAT_VERSION,
        "base_model": identity.base_model,
        "tokenizer_hash": identity.tokenizer_hash,
        "gist_version": identity.gist_version,
        "block_size": identity.block_size,
        "gist_width": identity.gist_width,
        "key_width": identity.key_width,
        "gist_dtype": identity.gist_dtype,
        "roll_backs": 0,
    }
    return [(key, str(value)) for key, value in rows.items()]


def _add_commit(connection: sqlite3.Connection, generation: int, n_tokens: int) -> None:
    connection.execute("INSERT INTO commits VALUES (?, ?, ?)", (generation, n_tokens, time.time()))


def _update_file(connection: sqlite3.Connection, update: FileUpdate, generation: int) -> None:
    file_id = update.id
    if file_id is None:
        file_id = connection.execute(
            "INSERT INTO files (name, kind, level, length, generation) VALUES (?, ?, ?, ?, ?)",
            (update.name, update.kind, update.level, update.length, generation),
        ).lastrowid
    else:
        connection.execute("UPDATE files SET length = ? WHERE id = ?", (update.length, file_id))
    connection.executemany(
        "REPLACE INTO chunks VALUES (?, ?, ?, ?)",
        [(file_id, chunk.start, chunk.count, chunk.crc32) for chunk in update.chunks],
    )


def _update_source(connection: sqlite3.Connection, span: SourceRange, generation: int) -> None:
    if not span.new:
        connection.execute("UPDATE sources SET end_token = ? WHERE id = ?", (span.end, span.id))
        return
    source = span.source
    connection.execute(
        "INSERT INTO sources VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            span.id,
            source.uri,
            source.media_type,
            source.sha256,
            source.author,
            source.created,
            json.dumps(source.tags),
            span.start,
            span.end,
            time.time(),
            generation,
        ),
    )


def _source_record(row: tuple[Any, ...], n_tokens: int) -> SourceRecord:
    source_id, uri, media_type, sha256, author, created, tags, start, end, ingested_at = row
    return SourceRecord(
        uri=uri,
        media_type=media_type,
        sha256=sha256,
        author=author,
        created=created,
        tags=tuple(json.loads(tags)),
        id=source_id,
        start=start,
        end=min(end, n_tokens),
        ingested_at=ingested_at,
    )
