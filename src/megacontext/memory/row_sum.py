"""A sum over the catalog's rows that every commit brings up to date.

SQLite keeps no checksums, so a changed byte in a row would go unnoticed. The sum of one hash per
row can be brought up to date at the cost of the rows that change, in whatever order rows come and
go (MSet-Add-Hash: Clarke, Devadas, van Dijk, Gassend and Suh, "Incremental Multiset Hash Functions
and Their Application to Memory Integrity Checking", 2003; it guards against decay, not malice).
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from typing import Any, Final

from megacontext.memory.schema import TABLES

ROW_SUM: Final = "row_sum"
INDEX_SUM: Final = "index_sum"
ROLL_BACKS: Final = "roll_backs"
_BITS: Final = 128
# Sums cannot cover themselves; the number of roll-backs only makes a transaction write something.
_UNCOUNTED: Final = frozenset({ROW_SUM, ROLL_BACKS})


def _tagged(value: bytes) -> dict[str, str]:
    return {"bytes": value.hex()}


_ENCODER: Final = json.JSONEncoder(ensure_ascii=True, default=_tagged)


def row_hash(table: str, row: Sequence[Any]) -> int:
    """128 bits that change with any value of a row."""
    text = _ENCODER.encode([table, *row])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=_BITS // 8).digest())


def count_rows(connection: sqlite3.Connection) -> str:
    """The sum over all rows as they are now, 32 hexadecimal digits."""
    total = 0
    for table in TABLES:
        rows = connection.execute(f"SELECT * FROM {table}")  # noqa: S608
        total += sum(row_hash(table, row) for row in rows if _counts(table, row))
    return _hex(total)


def write_sum(connection: sqlite3.Connection, key: str, value: str) -> None:
    """Stores a sum; it does not count itself."""
    connection.execute("REPLACE INTO meta VALUES (?, ?)", (key, value))


class CountedRows:
    """Changes rows within one transaction and keeps their sum.

    Args:
        connection: inside a transaction.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._change = 0

    def put(self, table: str, row: Sequence[Any]) -> None:
        """Inserts a row, or puts it in the place of the one with the same key."""
        keys = [value for value, is_key in zip(row, TABLES[table].values(), strict=True) if is_key]
        self._count(table, self._rows(table, keys), -1)
        places = ", ".join("?" * len(row))
        self._connection.execute(f"REPLACE INTO {table} VALUES ({places})", row)  # noqa: S608
        # As it is read back: a column's affinity may have changed a number's type.
        self._count(table, self._rows(table, keys), 1)

    def change(self, table: str, key: int, column: str, value: int) -> None:
        """Changes one number of a row."""
        self._count(table, self._rows(table, [key]), -1)
        self._connection.execute(
            f"UPDATE {table} SET {column} = ? WHERE {_match(table)}",  # noqa: S608
            (value, key),
        )
        self._count(table, self._rows(table, [key]), 1)

    def delete(self, table: str, condition: str) -> None:
        """Removes the rows that fulfil a condition."""
        rows = self._connection.execute(f"SELECT * FROM {table} WHERE {condition}")  # noqa: S608
        self._count(table, rows, -1)
        self._connection.execute(f"DELETE FROM {table} WHERE {condition}")  # noqa: S608

    def close(self) -> None:
        """Writes the sum; nothing may change afterwards."""
        (old,) = self._connection.execute(
            "SELECT value FROM meta WHERE key = ?", (ROW_SUM,)
        ).fetchone()
        write_sum(self._connection, ROW_SUM, _hex(int(old, 16) + self._change))

    def _rows(self, table: str, keys: Sequence[Any]) -> sqlite3.Cursor:
        statement = f"SELECT * FROM {table} WHERE {_match(table)}"  # noqa: S608
        return self._connection.execute(statement, keys)

    def _count(self, table: str, rows: Iterable[Sequence[Any]], sign: int) -> None:
        self._change += sign * sum(row_hash(table, row) for row in rows if _counts(table, row))


def _match(table: str) -> str:
    return " AND ".join(f"{name} = ?" for name, is_key in TABLES[table].items() if is_key)


def _counts(table: str, row: Sequence[Any]) -> bool:
    return table != "meta" or row[0] not in _UNCOUNTED


def _hex(total: int) -> str:
    return f"{total % (1 << _BITS):0{_BITS // 4}x}"
