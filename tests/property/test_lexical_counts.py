"""Counts of blocks per term, kept over commits, against counting anew."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from megacontext.errors import MemoryStoreError
from megacontext.memory import Memory, MemoryIdentity
from megacontext.memory.rebuild import GistBatch

BLOCK = 2
# Words of one stem, words of two terms, words that no block has.
WORDS = ("pear", "pears", "running", "ran", "runs", "fig-tree", "tree", "café", "cafe", "42")
ASKED = (*WORDS, "absent", "fig", "?!")
texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join), min_size=1, max_size=6)


def weight(n_blocks: int, counts: list[int]) -> float:
    if not counts:
        return 0.0
    return math.log1p((n_blocks - min(counts) + 0.5) / (min(counts) + 0.5))


class CountsMachine(RuleBasedStateMachine):
    @initialize()
    def create(self) -> None:
        self.directory = Path(tempfile.mkdtemp())
        identity = MemoryIdentity("base", "tok", "gist", BLOCK, 1, 0, "fp16")
        self.memory = Memory.create(self.directory / "m.mctx", identity)
        self.reader = Memory.open(self.memory.path)

    def append_tokens(self, n: int, given: list[str]) -> None:
        before, gists, level = self.memory.n_tokens, {}, 1
        while (before + n) // BLOCK**level:
            gists[level] = torch.zeros((before + n) // BLOCK**level - before // BLOCK**level, 1)
            level += 1
        self.memory.append(torch.zeros(n, dtype=torch.int64), gists, {}, block_texts=given)

    @rule(given=texts)
    def append(self, given: list[str]) -> None:
        open_tokens = self.memory.n_tokens % BLOCK
        self.append_tokens(BLOCK * len(given) - open_tokens, given)

    @rule(n=st.integers(1, 5))
    def append_without_texts(self, n: int) -> None:
        self.append_tokens(n, [])

    @rule(given=texts, call=st.sampled_from(["fsync", "pwrite"]))
    def fail_to_append(self, given: list[str], call: str) -> None:
        with patch.object(os, call, side_effect=OSError(5, "no disk")):
            try:
                self.append(given)
            except MemoryStoreError:
                return
        raise AssertionError("the disk failed, and nothing was said")

    @rule(given=texts)
    def fail_to_commit(self, given: list[str]) -> None:
        """The index has the texts already when the commit is given up."""
        catalog = self.memory._catalog
        with patch.object(catalog, "_add_to_index_sum", side_effect=MemoryStoreError("full")):
            try:
                self.append(given)
            except MemoryStoreError:
                return
        raise AssertionError("the catalog failed, and nothing was said")

    @rule()
    def rebuild(self) -> None:
        def make(level, children):
            yield GistBatch(torch.zeros(self.memory.count(level), 1), None, None)

        self.memory.replace_gists(make, gist_version="other")

    @rule()
    def reopen(self) -> None:
        path = self.memory.path
        self.memory.close()
        self.memory = Memory.open(path, "a")

    @rule()
    def refresh(self) -> None:
        self.reader.refresh()
        assert self.reader.term_weights(ASKED) == self.expected()

    @rule(words=st.lists(st.sampled_from(ASKED), min_size=1, unique=True))
    def ask(self, words: list[str]) -> None:
        expected = self.expected()
        assert self.memory.term_weights(words) == {word: expected[word] for word in words}

    @invariant()
    def counts_are_those_of_the_index(self) -> None:
        if not hasattr(self, "memory"):
            return
        lexical = self.memory._catalog.lexical
        if lexical._frequencies_of == self.memory.generation:
            counted = self.counts()
            for stem, count in lexical._frequencies.items():
                assert count == counted.get(stem, 0), stem

    def counts(self) -> dict[str, int]:
        """Blocks of every term, as the index itself counts them."""
        connection = self.memory._catalog._connection
        return dict(connection.execute("SELECT term, doc FROM block_terms").fetchall())

    def expected(self) -> dict[str, float]:
        """Weights from counts made anew, by a memory that has never counted before."""
        with Memory.open(self.memory.path) as fresh:
            weights = fresh.term_weights(ASKED)
        counts, blocks = self.counts(), self.memory.count(1)
        assert weights["absent"] == weight(blocks, [0])
        assert weights["42"] == weight(blocks, [counts.get("42", 0)])
        return weights

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()
            self.reader.close()
            shutil.rmtree(self.directory)


CountsMachine.TestCase.settings = settings(max_examples=12, stateful_step_count=15, deadline=None)
TestCountsMachine = CountsMachine.TestCase
