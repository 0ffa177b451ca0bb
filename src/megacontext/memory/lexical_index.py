"""BM25 over blocks, kept by SQLite's FTS5 in the catalog and committed with it."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NamedTuple

from megacontext.errors import InputError
from megacontext.memory.index_sum import added_terms
from megacontext.memory.schema import TOKENIZER, sqlite_errors

COMMON_SHARE: Final = 0.1
"""A term in more than this share of the blocks is left out of a search that has rarer ones."""

COMMON_FLOOR: Final = 16
"""A term in at most this many blocks never counts as common: scoring them costs nothing."""

MAX_POSTINGS: Final = 32_768
"""A search scores about this many (term, block) pairs at most, rarest terms first."""

_MOST_COUNTS: Final = 1 << 16
"""Terms whose counts are kept, so that a long session needs bounded memory."""

_UNSTEMMED: Final = TOKENIZER.removeprefix("porter ")


class AddedTexts(NamedTuple):
    """What the texts of one commit change.

    Attributes:
        index_sum: what they add to the index's sum (see :mod:`~megacontext.memory.index_sum`).
        frequencies: of the stems whose counts are kept, how many of the texts contain each.
    """

    index_sum: int
    frequencies: Mapping[str, int]


class LexicalIndex:
    """Finds blocks by the words in them.

    Words are folded to lower case without diacritics and reduced to their Porter stem. The score
    is Okapi BM25 with k1 = 1.2 and b = 0.75 (Robertson and Zaragoza, "The Probabilistic Relevance
    Framework: BM25 and Beyond", 2009), as FTS5 computes it.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._splitter: sqlite3.Connection | None = None
        self._frequencies: dict[str, int] = {}
        self._frequencies_of = -1

    def add(self, first_block: int, texts: Sequence[str]) -> AddedTexts:
        """Indexes the texts of consecutive blocks, inside the caller's transaction.

        Args:
            first_block: index of the first one.
            texts: one per block.

        Returns:
            What they change, for :meth:`carry_over` once the transaction is committed.
        """
        rows = [(first_block + i, _storable(text)) for i, text in enumerate(texts, start=1)]
        self._connection.executemany("INSERT INTO blocks (rowid, text) VALUES (?, ?)", rows)
        with self._splitting() as splitter:
            splitter.executemany("INSERT INTO stemmed (rowid, text) VALUES (?, ?)", rows)
            return AddedTexts(added_terms(splitter, "stemmed_terms"), self._known(splitter))

    def carry_over(self, generation: int, frequencies: Mapping[str, int]) -> None:
        """Keeps the counts over a commit of this process; others' commits make them void.

        Args:
            generation: the commit that was just made.
            frequencies: what it added to them.
        """
        if self._frequencies_of != generation - 1:
            return
        for stem, count in frequencies.items():
            self._frequencies[stem] += count
        self._frequencies_of = generation

    def search(
        self, query: str, limit: int, *, n_blocks: int, generation: int
    ) -> list[tuple[int, float]]:
        """The blocks that match best.

        Any word of the query may match. Terms in more than :data:`COMMON_SHARE` of the blocks are
        left out where the query has rarer ones, and so are the most frequent of the rest beyond
        :data:`MAX_POSTINGS`, so that the cost does not grow with the history.

        Args:
            query: plain text; nothing in it is query syntax.
            limit: most blocks to return.
            n_blocks: only blocks before this one count.
            generation: commit that the caller sees.

        Returns:
            ``(block, score)``, best first, ties to the newer block.

        Raises:
            InputError: ``limit`` is negative.
        """
        if limit < 0:
            raise InputError(f"lexical search: limit is {limit}, it must be 0 or more")
        words = self._distinctive(self._split(query), n_blocks, generation)
        if not words or limit == 0:
            return []
        match = " OR ".join(f'"{word}"' for word in words)
        with sqlite_errors(self._path, "search"):
            return self._connection.execute(
                "SELECT rowid - 1, -bm25(blocks) AS score FROM blocks "
                "WHERE blocks MATCH ? AND rowid <= ? ORDER BY score DESC, rowid DESC LIMIT ?",
                (match, n_blocks, limit),
            ).fetchall()

    def idf(self, words: Iterable[str], *, n_blocks: int, generation: int) -> dict[str, float]:
        """How telling each word is: ``ln(1 + (N - n + 0.5) / (n + 0.5))``.

        Args:
            words: words as they are written.
            n_blocks: ``N``, blocks in the memory.
            generation: commit that the caller sees.

        Returns:
            One weight per distinct word, 0 for one without letters and digits. Where a word falls
            into several terms, the rarest of them counts.
        """
        weights: dict[str, float] = {}
        distinct = list(dict.fromkeys(words))
        for word, stems in zip(distinct, self._stems(distinct), strict=True):
            counts = [min(self._frequency(stem, generation), n_blocks) for stem in stems]
            rarest = min(counts, default=None)
            weights[word] = (
                0.0 if rarest is None else math.log1p((n_blocks - rarest + 0.5) / (rarest + 0.5))
            )
        return weights

    def close(self) -> None:
        """Closes what splitting queries needed; the catalog's connection stays open."""
        if self._splitter is not None:
            self._splitter.close()
            self._splitter = None

    def _distinctive(self, terms: dict[str, str], n_blocks: int, generation: int) -> list[str]:
        """Words worth searching for, rarest first; ``terms`` maps stems to words."""
        counted = sorted((self._frequency(stem, generation), stem) for stem in terms)
        common = max(n_blocks * COMMON_SHARE, COMMON_FLOOR)
        present = [(count, stem) for count, stem in counted if count > 0]
        kept = [item for item in present if item[0] <= common] or present
        words: list[str] = []
        postings = 0
        for count, stem in kept:
            postings += count
            if words and postings > MAX_POSTINGS:
                break
            words.append(terms[stem])
        return words

    def _frequency(self, stem: str, generation: int) -> int:
        """Blocks that contain a stem."""
        if self._frequencies_of != generation:
            self._frequencies.clear()
            self._frequencies_of = generation
        count = self._frequencies.get(stem)
        if count is None:
            with sqlite_errors(self._path, "search"):
                row = self._connection.execute(
                    "SELECT doc FROM block_terms WHERE term = ?", (stem,)
                ).fetchone()
            count = int(row[0]) if row is not None else 0
            if len(self._frequencies) >= _MOST_COUNTS:
                self._frequencies.clear()
            self._frequencies[stem] = count
        return count

    def _known(self, splitter: sqlite3.Connection) -> dict[str, int]:
        """Of the stems whose counts are kept, how many of the texts just split contain each."""
        if not self._frequencies:
            return {}
        counted = splitter.execute("SELECT term, doc FROM stemmed_blocks")
        return {stem: count for stem, count in counted if stem in self._frequencies}

    def _stems(self, words: Sequence[str]) -> list[list[str]]:
        """The terms that each word falls into, all in one go."""
        stems: list[list[str]] = [[] for _ in words]
        rows = [(number, _storable(word)) for number, word in enumerate(words, start=1)]
        with self._splitting() as splitter:
            splitter.executemany("INSERT INTO stemmed (rowid, text) VALUES (?, ?)", rows)
            for number, term in splitter.execute("SELECT doc, term FROM stemmed_terms"):
                stems[number - 1].append(term)
        return stems

    def _split(self, text: str) -> dict[str, str]:
        """Splits a text exactly as the index does: each stem with a folded word that has it.

        A stem cannot be searched for, because the index would stem it a second time.
        """
        with self._splitting() as splitter:
            for table in ("stemmed", "folded"):
                splitter.execute(
                    f"INSERT INTO {table} (rowid, text) VALUES (1, ?)",  # noqa: S608
                    (_storable(text),),
                )
            stems, words = (
                dict(splitter.execute(f"SELECT offset, term FROM {table}_terms").fetchall())  # noqa: S608
                for table in ("stemmed", "folded")
            )
        return {stem: words[offset] for offset, stem in stems.items()}

    @contextmanager
    def _splitting(self) -> Generator[sqlite3.Connection]:
        """Empty indexes in memory that split texts exactly as the stored one does."""
        splitter = self._splitter
        if splitter is None:
            splitter = self._splitter = _make_splitter()
        with sqlite_errors(self._path, "split words for"):
            splitter.execute("BEGIN")
            try:
                yield splitter
            finally:
                splitter.execute("ROLLBACK")


def _make_splitter() -> sqlite3.Connection:
    splitter = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
    for table, tokenizer in (("stemmed", TOKENIZER), ("folded", _UNSTEMMED)):
        splitter.execute(
            f"CREATE VIRTUAL TABLE {table} USING fts5 (text, content='', tokenize='{tokenizer}')"
        )
        splitter.execute(
            f"CREATE VIRTUAL TABLE {table}_terms USING fts5vocab ('{table}', 'instance')"
        )
    splitter.execute("CREATE VIRTUAL TABLE stemmed_blocks USING fts5vocab ('stemmed', 'row')")
    return splitter


def _storable(text: str) -> str:
    """Replaces lone surrogates, which have no UTF-8."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
