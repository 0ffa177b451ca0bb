"""Tables of ``catalog.sqlite``, connections to it, and what its errors mean."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import quote

from megacontext.errors import (
    CorruptMemoryError,
    MemoryLockedError,
    MemoryStoreError,
    ReadOnlyMemoryError,
    StorageFullError,
)
from megacontext.memory.storage_io import FILE_MODE, storing

FORMAT_VERSION: Final = 1
CATALOG_NAME: Final = "catalog.sqlite"
TOKENIZER: Final = "porter unicode61 remove_diacritics 2"

_BUSY_SECONDS: Final = 10.0
_WAL_LIMIT_BYTES: Final = 16 << 20

_TABLES: Final = f"""
CREATE TABLE meta (
  key TEXT PRIMARY KEY,
  value TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE commits (
  generation INTEGER PRIMARY KEY,
  n_tokens INTEGER NOT NULL CHECK (n_tokens >= 0),
  committed_at REAL NOT NULL
);
CREATE TABLE files (
  id INTEGER PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  kind TEXT NOT NULL CHECK (kind IN ('tokens', 'gists', 'keys', 'fidelity')),
  level INTEGER NOT NULL CHECK (level >= 0),
  length INTEGER NOT NULL CHECK (length >= 0),
  generation INTEGER NOT NULL REFERENCES commits (generation),
  UNIQUE (kind, level)
);
CREATE TABLE chunks (
  file_id INTEGER NOT NULL REFERENCES files (id) ON DELETE CASCADE,
  start INTEGER NOT NULL CHECK (start >= 0),
  count INTEGER NOT NULL CHECK (count > 0),
  crc32 INTEGER NOT NULL,
  PRIMARY KEY (file_id, start)
) WITHOUT ROWID;
CREATE TABLE sources (
  id INTEGER PRIMARY KEY,
  uri TEXT NOT NULL,
  media_type TEXT NOT NULL,
  sha256 TEXT NOT NULL,
  author TEXT NOT NULL,
  created REAL,
  tags TEXT NOT NULL,
  start_token INTEGER NOT NULL,
  end_token INTEGER NOT NULL CHECK (end_token > start_token),
  ingested_at REAL NOT NULL,
  generation INTEGER NOT NULL REFERENCES commits (generation)
);
CREATE UNIQUE INDEX sources_by_start ON sources (start_token);
CREATE VIRTUAL TABLE blocks USING fts5 (text, content='', tokenize='{TOKENIZER}');
CREATE VIRTUAL TABLE block_terms USING fts5vocab ('blocks', 'row');
"""


def create_tables(path: Path) -> sqlite3.Connection:
    """Makes the database file, with mode 0600 and write-ahead logging, and its empty tables."""
    with storing(path, "create"):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, FILE_MODE))
    connection = connect(path, writable=True)
    with sqlite_errors(path, "create"):
        connection.executescript(f"BEGIN; {_TABLES} COMMIT;")
    return connection


def connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    """Opens the database: for reading and writing, or for reading only.

    On a medium that nobody can write to, SQLite cannot make its shared-memory file; the database
    is then opened as immutable, which is true there as long as no log lies beside it.

    Raises:
        CorruptMemoryError, ReadOnlyMemoryError, MemoryStoreError: it cannot be opened.
    """
    with sqlite_errors(path, "open"):
        if writable:
            connection = _connect(path, "mode=rw")
            try:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute("PRAGMA foreign_keys = ON")
                connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
            except BaseException:
                connection.close()
                raise
            return connection
        try:
            return _probe(_connect(path, "mode=ro"))
        except sqlite3.OperationalError as error:
            if primary_code(error) not in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
                raise
            if _has_log(path) or os.access(path.parent, os.W_OK):
                raise
            return _probe(_connect(path, "immutable=1"))


@contextmanager
def sqlite_errors(path: Path, action: str) -> Generator[None]:
    """Raises the matching :class:`MemoryStoreError` for a database error inside the block."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translate(error, path, action) from error


def _translate(error: sqlite3.Error, path: Path, action: str) -> MemoryStoreError:
    code = primary_code(error)
    if code == sqlite3.SQLITE_FULL:
        return StorageFullError(
            f"{path}: cannot {action}: {error}; free some space and try again, everything "
            "committed before is still there"
        )
    if code == sqlite3.SQLITE_READONLY:
        return ReadOnlyMemoryError(
            f"{path}: cannot {action}: {error}; open the memory with mode 'r', or allow writing"
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return MemoryLockedError(
            f"{path}: cannot {action}: another program works on the catalog ({error}); "
            "try again when it has finished"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT) or (
        code == sqlite3.SQLITE_ERROR and str(error).startswith("no such ")
    ):
        return CorruptMemoryError(f"the catalog is damaged: {error}", path=path)
    return MemoryStoreError(
        f"{path}: cannot {action}: {error}; check the disk and its file system and try again"
    )


def primary_code(error: sqlite3.Error) -> int:
    """The low byte of SQLite's extended error code; 0 for errors of Python's own binding."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _connect(path: Path, options: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?{options}",
        uri=True,
        timeout=_BUSY_SECONDS,
        isolation_level=None,
        check_same_thread=False,
    )


def _probe(connection: sqlite3.Connection) -> sqlite3.Connection:
    try:
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    except BaseException:
        connection.close()
        raise
    return connection


def _has_log(path: Path) -> bool:
    log = path.with_name(path.name + "-wal")
    return log.exists() and log.stat().st_size > 0
