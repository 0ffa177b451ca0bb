"""A sum over everything the lexical index holds, and the check that a search can find all of it.

The index has no copy of the texts to be compared with, and SQLite keeps no checksums. So every
commit adds one number per occurrence of a term, and a check reads all occurrences back. The order
of commits and the index's own merging do not matter to the sum.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from typing import Final

NO_TERMS: Final = f"{0:016x}"

_MODULUS: Final = 1 << 64
_DOC_FACTOR: Final = 2_654_435_761
_DOC_MODULUS: Final = 4_294_967_291
_TOTALS_ROW: Final = 1
_MOST_PROBLEMS: Final = 8


def added_terms(connection: sqlite3.Connection, instances: str) -> int:
    """What the texts in an ``fts5vocab`` table of type ``instance`` add to the sum."""
    # The same number as _place; blocks of one commit cannot overflow it.
    rows = connection.execute(
        f"SELECT term, sum((doc + 7919) * (offset * 8 + 65537)) FROM {instances} GROUP BY term"  # noqa: S608
    )
    return sum(_term_hash(term) * places for term, places in rows) % _MODULUS


def add_terms(total: str, added: int) -> str:
    """A sum, 16 hexadecimal digits, and what comes to it."""
    return f"{(int(total, 16) + added) % _MODULUS:016x}"


def count_terms(connection: sqlite3.Connection) -> str:
    """The sum over the whole index, 16 hexadecimal digits."""
    total = 0
    for term, places in groupby(_instances(connection), key=lambda row: row[0]):
        total += _term_hash(term) * sum(_place(block, offset) for _, block, offset in places)
    return add_terms(NO_TERMS, total % _MODULUS)


def index_problems(connection: sqlite3.Connection, expected: str | None) -> list[str]:
    """What is wrong with the lexical index.

    Args:
        connection: the catalog's; it may be open for reading only.
        expected: the sum that belongs to it; ``None`` where there is none yet.

    Raises:
        sqlite3.Error: it cannot even be read.
    """
    problems: list[str] = []
    total = weighed = n_terms = 0
    find = "SELECT doc, cnt FROM block_terms WHERE term = ?"
    for term, places in groupby(_instances(connection), key=lambda row: row[0]):
        blocks = occurrences = summed = 0
        before = None
        for _, block, offset in places:
            blocks += block != before
            before = block
            occurrences += 1
            summed += _place(block, offset)
            weighed += _weight(block)
        total += _term_hash(term) * summed
        n_terms += occurrences
        if connection.execute(find, (term,)).fetchone() != (blocks, occurrences):
            problems.append(f"the lexical index does not find its term {term!r}")
    if expected is not None and add_terms(NO_TERMS, total % _MODULUS) != expected:
        problems.append("the lexical index does not hold what was committed")
    problems += _length_problems(connection, n_terms, weighed)
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"… and {len(problems) - _MOST_PROBLEMS} more of the kind"]
    return problems


def _length_problems(connection: sqlite3.Connection, n_terms: int, weighed: int) -> Iterator[str]:
    """Blocks' lengths, which their scores depend on, against the terms that were found in them."""
    n_blocks = stored = 0
    for block, size in connection.execute("SELECT id, sz FROM blocks_docsize"):
        (length,) = _varints(size, 1)
        if not isinstance(block, int):  # SQLite lets a damaged key be anything
            yield "the lexical index has the length of no block"
            continue
        n_blocks += 1
        stored += length
        weighed -= length * _weight(block)
    if weighed or stored != n_terms:
        yield "the lexical index has wrong lengths of blocks"
    row = connection.execute(
        "SELECT block FROM blocks_data WHERE id = ?", (_TOTALS_ROW,)
    ).fetchone()
    raw = row[0] if row else None
    # Empty until there is a first block.
    if _varints(raw, 2) != [n_blocks, stored] and (n_blocks or raw != b""):
        yield "the lexical index has wrong totals"


def _instances(connection: sqlite3.Connection) -> Iterable[tuple[str, int, int]]:
    """Term, row and offset of every occurrence of every term, sorted by term."""
    connection.execute(
        "CREATE VIRTUAL TABLE IF NOT EXISTS temp.block_instances "
        "USING fts5vocab (main, blocks, instance)"
    )
    return connection.execute("SELECT term, doc, offset FROM temp.block_instances")


def _place(block: int, offset: int) -> int:
    """A number per place of a term: any change of block or offset changes it."""
    return (block + 7919) * (offset * 8 + 65537)


@lru_cache(maxsize=1 << 16)
def _term_hash(term: str | bytes) -> int:
    """64 bits, odd: no difference of places is lost in a product with it."""
    raw = term.encode() if isinstance(term, str) else term
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest()) | 1


def _weight(block: int) -> int:
    return block * _DOC_FACTOR % _DOC_MODULUS


def _varints(raw: object, count: int) -> list[int]:
    """SQLite's variable-length integers; -1 for what is not there."""
    numbers: list[int] = []
    data = raw if isinstance(raw, bytes) else b""
    place = 0
    for _ in range(count):
        number, ended = 0, False
        for step in range(9):
            byte = data[place : place + 1]
            if not byte:
                break
            place += 1
            number = number << 8 | byte[0] if step == 8 else number << 7 | byte[0] & 0x7F
            ended = step == 8 or byte[0] < 0x80
            if ended:
                break
        numbers.append(number if ended else -1)
    return numbers if place == len(data) else [-1] * count
