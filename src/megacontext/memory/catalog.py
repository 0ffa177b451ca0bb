"""The catalog: the commit point of a memory, and its account of every file, chunk and source."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from megacontext.errors import CorruptMemoryError, MemoryVersionError
from megacontext.memory.catalog_rows import (
    SOURCE_COLUMNS,
    UNFINISHED,
    Chunk,
    FileUpdate,
    Snapshot,
    SourceRange,
    integer,
    read_chunk,
    read_file,
    read_identity,
    read_source,
    read_unfinished,
)
from megacontext.memory.identity import MemoryIdentity, Source, SourceRecord
from megacontext.memory.index_sum import NO_TERMS, add_terms, count_terms, index_problems
from megacontext.memory.lexical_index import LexicalIndex
from megacontext.memory.row_sum import (
    INDEX_SUM,
    ROLL_BACKS,
    ROW_SUM,
    CountedRows,
    count_rows,
    write_sum,
)
from megacontext.memory.schema import (
    CATALOG_NAME,
    FORMAT_VERSION,
    OLDEST_VERSION,
    connect,
    create_tables,
    primary_code,
    schema_problems,
    sqlite_errors,
)


class Catalog:
    """``catalog.sqlite`` of one memory. One writer, any number of readers."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self.lexical = LexicalIndex(connection, path)
        self._connection = connection
        self._commit_attempted = False

    @classmethod
    def create(cls, directory: Path, identity: MemoryIdentity, token_file: str) -> Snapshot:
        """Makes the catalog of an empty memory; returns what it holds."""
        path = directory / CATALOG_NAME
        catalog = cls(path, create_tables(path))
        try:
            with sqlite_errors(path, "create"):
                execute = catalog._connection.execute
                execute("BEGIN")
                write_sum(catalog._connection, ROW_SUM, "0")
                with catalog._counting() as rows:
                    for row in _meta_rows(identity):
                        rows.put("meta", row)
                    rows.put("meta", (INDEX_SUM, NO_TERMS))
                    rows.put("meta", (ROLL_BACKS, "0"))
                    rows.put("commits", (0, 0, time.time()))
                    rows.put("files", (1, token_file, "tokens", 0, 0, 0))
                execute("COMMIT")
            return catalog.snapshot()
        finally:
            catalog.close()

    @classmethod
    def open(cls, directory: Path, *, writable: bool) -> Catalog:
        """Opens an existing catalog; one of an older version is brought up to date for writing.

        Raises:
            CorruptMemoryError: the file is no catalog.
            MemoryVersionError: it is one of a newer version.
        """
        path = directory / CATALOG_NAME
        catalog = cls(path, connect(path, writable=writable))
        try:
            version = catalog._check_version()
            if writable and version < FORMAT_VERSION:
                catalog._upgrade()
        except BaseException:
            catalog.close()
            raise
        return catalog

    def snapshot(self, *, tokens_only: bool = False) -> Snapshot:
        """The last commit: lengths, files and identity, all of the same moment.

        Args:
            tokens_only: leaves out the sum, and every file but that of the tokens.

        Raises:
            CorruptMemoryError: the tables contradict each other.
        """
        with sqlite_errors(self.path, "read"), self._reading():
            execute = self._connection.execute
            meta = self._read_meta()
            commit = execute(
                "SELECT generation, n_tokens FROM commits ORDER BY generation DESC LIMIT 1"
            ).fetchone()
            rows = execute(
                "SELECT id, name, kind, level, length, start, count, crc32 FROM files "
                "LEFT JOIN chunks ON file_id = id AND start = "
                "(SELECT max(start) FROM chunks WHERE file_id = files.id) "
                "WHERE kind = 'tokens' OR NOT ? ORDER BY level, kind",
                (tokens_only,),
            ).fetchall()
        if commit is None:
            raise CorruptMemoryError("the catalog has no commit", path=self.path)
        generation, n_tokens = (integer(value, "last commit", self.path) for value in commit)
        identity = read_identity(meta, self.path)
        files = tuple(read_file(row, self.path) for row in rows)
        row_sum = "" if tokens_only else self._row_sum(meta)
        return Snapshot(generation, n_tokens, identity, files, row_sum)

    def generation(self) -> int:
        """Number of the last commit."""
        with sqlite_errors(self.path, "read"):
            row = self._connection.execute("SELECT max(generation) FROM commits").fetchone()
        return integer(row[0], "last commit", self.path)

    def commit_append(
        self,
        generation: int,
        n_tokens: int,
        files: Iterable[FileUpdate],
        *,
        texts: Sequence[str] = (),
        first_block: int = 0,
        sources: Sequence[SourceRange] = (),
    ) -> None:
        """Records one append; afterwards it has happened.

        Args:
            generation: number of this commit.
            n_tokens: tokens of the memory from now on.
            files: files that have grown.
            texts: texts of the blocks from ``first_block`` on, for the lexical index.
            first_block: block of the first text.
            sources: where the tokens come from, each once.

        Raises:
            StorageFullError, MemoryStoreError: nothing was recorded, call :meth:`roll_back`.
        """
        frequencies: Mapping[str, int] = {}
        with self._writing() as rows:
            rows.put("commits", (generation, n_tokens, time.time()))
            for update in files:
                self._put_file(rows, update, generation)
            for source in sources:
                if source.new:
                    place = (source.id, source.start, source.end)
                    rows.put("sources", _source_row(source.source, place, time.time(), generation))
                else:
                    rows.change("sources", source.id, "end_token", source.end)
            self._note_unfinished(rows, sources)
            if texts:
                added, frequencies = self.lexical.add(first_block, texts)
                rows.put("meta", (INDEX_SUM, self._add_to_index_sum(added)))
        self.lexical.carry_over(generation, frequencies)

    def commit_sources(
        self, generation: int, n_tokens: int, sources: Sequence[SourceRecord]
    ) -> None:
        """Records sources of tokens that are there already, as they were in another memory."""
        with self._writing() as rows:
            rows.put("commits", (generation, n_tokens, time.time()))
            for source in sources:
                place = (source.id, source.start, source.end)
                rows.put("sources", _source_row(source, place, source.ingested_at, generation))
            rest = [source.id for source in sources if not source.complete]
            if rest:
                rows.put("meta", (UNFINISHED, json.dumps(sorted(rest))))

    def commit_replacement(
        self, generation: int, n_tokens: int, identity: MemoryIdentity, files: Iterable[FileUpdate]
    ) -> None:
        """Puts new gist, key and fidelity files, and their identity, in the place of the old."""
        with self._writing() as rows:
            rows.put("commits", (generation, n_tokens, time.time()))
            rows.delete("chunks", "file_id IN (SELECT id FROM files WHERE kind <> 'tokens')")
            rows.delete("files", "kind <> 'tokens'")
            for update in files:
                self._put_file(rows, update, generation)
            for row in _meta_rows(identity):
                rows.put("meta", row)

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
                    "UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE key = ?",
                    (ROLL_BACKS,),
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
        return [read_chunk(row, self.path) for row in rows]

    def sources(self, n_tokens: int) -> list[SourceRecord]:
        """Sources that start within the first ``n_tokens`` tokens, oldest first."""
        with sqlite_errors(self.path, "read"), self._reading():
            rows = self._connection.execute(
                f"SELECT {SOURCE_COLUMNS} FROM sources WHERE start_token < ? "  # noqa: S608
                "ORDER BY start_token",
                (n_tokens,),
            ).fetchall()
            unfinished = self._unfinished()
        return [read_source(row, n_tokens, self.path, unfinished) for row in rows]

    def source_at(self, token: int, n_tokens: int) -> SourceRecord | None:
        """The source of one token, or ``None``."""
        with sqlite_errors(self.path, "read"), self._reading():
            row = self._connection.execute(
                f"SELECT {SOURCE_COLUMNS} FROM sources WHERE start_token <= ? "  # noqa: S608
                "ORDER BY start_token DESC LIMIT 1",
                (token,),
            ).fetchone()
            unfinished = self._unfinished()
        record = read_source(row, n_tokens, self.path, unfinished) if row is not None else None
        return record if record is not None and token < record.end else None

    def source(self, source_id: int) -> SourceRecord | None:
        """A source by its number, or ``None``."""
        with sqlite_errors(self.path, "read"), self._reading():
            row = self._connection.execute(
                f"SELECT {SOURCE_COLUMNS} FROM sources WHERE id = ?",  # noqa: S608
                (source_id,),
            ).fetchone()
            unfinished = self._unfinished()
        return read_source(row, row[8], self.path, unfinished) if row is not None else None

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
        return integer(row[0], "last source", self.path)

    def integrity_problems(self) -> list[str]:
        """What is wrong with the database: its structure, its rows, its lexical index."""
        checks = (
            self._structure_problems,
            lambda: schema_problems(self._connection, self.path),
            self.row_problems,
            self._index_problems,
        )
        problems: list[str] = []
        for check in checks:
            try:
                with sqlite_errors(self.path, "check"), self._reading():
                    problems += check()
            except CorruptMemoryError as error:
                problems.append(error.reason)
        return problems

    def row_problems(self) -> list[str]:
        """What the sum over all rows says about them."""
        try:
            with sqlite_errors(self.path, "check"):
                expected = self._row_sum(self._read_meta())
                if expected in ("", count_rows(self._connection)):
                    return []
        except CorruptMemoryError as error:
            return [error.reason]
        return ["the catalog's rows are not those that were committed"]

    def readable_sources(self, n_tokens: int) -> tuple[tuple[SourceRecord, ...], int]:
        """Sources of the first ``n_tokens`` tokens that make sense, and how many do not."""
        kept: list[SourceRecord] = []
        lost = 0
        unfinished: frozenset[int] = frozenset()
        with sqlite_errors(self.path, "read"):
            rows = self._connection.execute(
                f"SELECT {SOURCE_COLUMNS} FROM sources ORDER BY start_token"  # noqa: S608
            ).fetchall()
            # Without the list they count as complete; that it is damaged, the rows' sum tells.
            with suppress(CorruptMemoryError):
                unfinished = self._unfinished()
        for row in rows:
            try:
                source = read_source(row, n_tokens, self.path, unfinished)
            except CorruptMemoryError:
                lost += 1
                continue
            if source.start < source.end and source.start >= (kept[-1].end if kept else 0):
                kept.append(source)
            else:
                lost += 1
        return tuple(kept), lost

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
            if self._connection.in_transaction:
                self._connection.execute("COMMIT")

    @contextmanager
    def _counting(self) -> Generator[CountedRows]:
        rows = CountedRows(self._connection)
        yield rows
        rows.close()

    @contextmanager
    def _writing(self) -> Generator[CountedRows]:
        with sqlite_errors(self.path, "commit to"):
            self._connection.execute("BEGIN IMMEDIATE")
            with self._counting() as rows:
                yield rows
            self._commit_attempted = True
            try:
                self._connection.execute("COMMIT")
            except sqlite3.Error as error:
                # A log that could not even be written to the end has no valid commit record.
                self._commit_attempted = primary_code(error) != sqlite3.SQLITE_FULL
                raise
            self._commit_attempted = False

    def _put_file(self, rows: CountedRows, update: FileUpdate, generation: int) -> None:
        number = update.id
        if number is None:
            found = self._connection.execute("SELECT coalesce(max(id), 0) + 1 FROM files")
            number = int(found.fetchone()[0])
            row = (number, update.name, update.kind, update.level, update.length, generation)
            rows.put("files", row)
        else:
            rows.change("files", number, "length", update.length)
        for chunk in update.chunks:
            rows.put("chunks", (number, chunk.start, chunk.count, chunk.crc32))

    def _unfinished(self) -> frozenset[int]:
        statement = "SELECT value FROM meta WHERE key = ?"
        row = self._connection.execute(statement, (UNFINISHED,)).fetchone()
        return read_unfinished(None if row is None else row[0], self.path)

    def _note_unfinished(self, rows: CountedRows, sources: Iterable[SourceRange]) -> None:
        """Notes which sources are incomplete once tokens of ``sources`` have come."""
        before = after = self._unfinished()
        for source in sources:
            after |= {source.id}
            if not source.more:
                after -= {source.id, *self._stretches(source.source, before)}
        if after != before:
            rows.put("meta", (UNFINISHED, json.dumps(sorted(after))))

    def _stretches(self, source: Source, among: Iterable[int]) -> list[int]:
        """Which of some sources are of the same text, as far as that can be known."""
        statement = "SELECT 1 FROM sources WHERE id = ? AND uri = ? AND sha256 = ?"
        same = (source.uri, source.sha256)
        return [
            number
            for number in among
            if source.sha256 and self._connection.execute(statement, (number, *same)).fetchone()
        ]

    def _structure_problems(self) -> list[str]:
        found = [row[0] for row in self._connection.execute("PRAGMA integrity_check")]
        orphans = self._connection.execute("PRAGMA foreign_key_check").fetchall()
        return [" ".join(str(line).split()) for line in found if line != "ok"] + [
            f"table {row[0]}, row {row[1]}: refers to nothing" for row in orphans
        ]

    def _index_problems(self) -> list[str]:
        meta = self._read_meta()
        return index_problems(self._connection, meta[INDEX_SUM] if self._row_sum(meta) else None)

    def _read_meta(self) -> dict[str, Any]:
        return dict(self._connection.execute("SELECT key, value FROM meta").fetchall())

    def _add_to_index_sum(self, added: int) -> str:
        found = self._connection.execute("SELECT value FROM meta WHERE key = ?", (INDEX_SUM,))
        return add_terms(str(found.fetchone()[0]), added)

    def _upgrade(self) -> None:
        """Sums for a catalog that has none."""
        with sqlite_errors(self.path, "bring up to date"):
            self._connection.execute("BEGIN IMMEDIATE")
            terms = count_terms(self._connection)
            write_sum(self._connection, ROW_SUM, "0")
            with self._counting() as rows:
                rows.put("meta", ("format_version", str(FORMAT_VERSION)))
                rows.put("meta", (INDEX_SUM, terms))
            write_sum(self._connection, ROW_SUM, count_rows(self._connection))
            self._connection.execute("COMMIT")

    def _check_version(self) -> int:
        with sqlite_errors(self.path, "open"):
            row = self._connection.execute(
                "SELECT value FROM meta WHERE key = 'format_version'"
            ).fetchone()
        if row is None or not re.fullmatch("[0-9]{1,9}", str(row[0])):
            raise CorruptMemoryError("the catalog has no format version", path=self.path)
        if not OLDEST_VERSION <= int(row[0]) <= FORMAT_VERSION:
            raise MemoryVersionError(
                f"{self.path.parent}: memory format {row[0]}, this MegaContext reads format "
                f"{FORMAT_VERSION}; use the version of MegaContext that wrote it, or a newer one"
            )
        return int(row[0])

    def _row_sum(self, meta: dict[str, Any]) -> str:
        if meta.get("format_version") == str(OLDEST_VERSION):
            return ""
        for key, digits in ((ROW_SUM, 32), (INDEX_SUM, 16)):
            if not re.fullmatch(f"[0-9a-f]{{{digits}}}", str(meta.get(key))):
                raise CorruptMemoryError(f"the catalog's {key} is missing", path=self.path)
        return str(meta[ROW_SUM])


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
    }
    return [(key, str(value)) for key, value in rows.items()]


def _source_row(
    source: Source, place: tuple[int, int, int], ingested: float, commit: int
) -> tuple[Any, ...]:
    """The row of a source whose number, first token and end are ``place``."""
    number, start, end = place
    return (
        number,
        source.uri,
        source.media_type,
        source.sha256,
        source.author,
        source.created,
        json.dumps(source.tags),
        start,
        end,
        ingested,
        commit,
    )
