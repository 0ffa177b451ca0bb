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

FORMAT_VERSION: Final = 2
"""Version 1 had no sums; it is read as it is, and brought up to date when it is opened to write."""

OLDEST_VERSION: Final = 1
CATALOG_NAME: Final = "catalog.sqlite"
TOKENIZER: Final = "porter unicode61 remove_diacritics 2"

_BUSY_SECONDS: Final = 10.0
_WAL_LIMIT_BYTES: Final = 16 << 20

TABLES: Final[dict[str, dict[str, bool]]] = {
    "meta": {"key": True, "value": False},
    "commits": {"generation": True, "n_tokens": False, "committed_at": False},
    "files": {
        "id": True,
        "name": False,
        "kind": False,
        "level": False,
        "length": False,
        "generation": False,
    },
    "chunks": {"file_id": True, "start": True, "count": False, "crc32": False},
    "sources": {
        "id": True,
        "uri": False,
        "media_type": False,
        "sha256": False,
        "author": False,
        "created": False,
        "tags": False,
        "start_token": False,
        "end_token": False,
        "ingested_at": False,
        "generation": False,
    },
}
"""Columns of the tables whose rows are summed, and whether they are part of the key."""

# Write and read version of the file; SQLite opens one with another write version for reading only.
_VERSIONS: Final = slice(18, 20)
_WAL_VERSIONS: Final = bytes([2, 2])

_SETTINGS: Final = {
    "journal_mode": "wal",
    "encoding": "UTF-8",
    "auto_vacuum": 0,
    "user_version": 0,
    "application_id": 0,
}

# Where the code does not tell: a schema that does not fit, and text that is no UTF-8.
_DAMAGE: Final = {
    sqlite3.SQLITE_ERROR: (
        "no such ",
        "malformed ",
        "unsupported file format",
        "unknown tokenizer",
        "vtable constructor failed",
        "invalid fts5 file format",
    ),
    0: ("Could not decode to UTF-8",),
}

_STATEMENTS: Final = f"""
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
    try:
        with sqlite_errors(path, "create"):
            connection.executescript(f"BEGIN; {_STATEMENTS} COMMIT;")
    except BaseException:
        connection.close()
        raise
    return connection


def schema_problems(connection: sqlite3.Connection, path: Path) -> list[str]:
    """What differs from the tables and settings that :func:`create_tables` makes.

    Raises:
        MemoryStoreError: the file cannot be read.
    """
    fresh = sqlite3.connect(":memory:", isolation_level=None)
    try:
        fresh.executescript(_STATEMENTS)
        # How FTS5 declares its own tables is its own affair.
        statement = (
            "SELECT type, name, tbl_name, CASE WHEN name GLOB 'blocks_*' THEN '' ELSE sql END "
            "FROM sqlite_schema WHERE name NOT GLOB 'sqlite_stat*'"
        )
        expected, found = (set(c.execute(statement).fetchall()) for c in (fresh, connection))
    finally:
        fresh.close()
    problems = [f"its schema has no {row[0]} {row[1]} as it should be" for row in expected - found]
    problems += [f"its schema has an odd {row[0]} {row[1]!r}" for row in found - expected]
    for name, value in _SETTINGS.items():
        (actual,) = connection.execute(f"PRAGMA {name}").fetchone()
        if actual != value:
            problems.append(f"its setting {name} is {actual!r}, not {value!r}")
    with storing(path, "read"), path.open("rb") as file:
        versions = file.read(_VERSIONS.stop)[_VERSIONS]
    if versions != _WAL_VERSIONS:
        problems.append("its header has file format versions that are not those of a log")
    return sorted(problems)


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
    except UnicodeDecodeError as error:
        # SQLite quotes a damaged schema in its message, which Python then cannot read.
        raise CorruptMemoryError(
            "the catalog is damaged: text in it is no UTF-8", path=path
        ) from error


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
    damaged = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT)
    if code in damaged or (code in _DAMAGE and str(error).startswith(_DAMAGE[code])):
        reason = " ".join(str(error).split())
        return CorruptMemoryError(f"the catalog is damaged: {reason}", path=path)
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
