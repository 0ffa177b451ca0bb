"""A memory on disk against a list in memory, through appends, reopenings and torn tails."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from megacontext.memory import Memory, MemoryIdentity, Source

WORDS = ("amber", "birch", "cobalt", "delta", "ember", "fjord")
WIDTH = 2


def reference_search(texts: dict[int, list[str]], query: set[str]) -> dict[int, float]:
    """Okapi BM25 (k1 1.2, b 0.75) over all indexed blocks."""
    mean = sum(len(words) for words in texts.values()) / max(len(texts), 1)
    found: dict[int, float] = {}
    for block, words in texts.items():
        hits = query.intersection(words)
        for term in hits:
            n = sum(term in other for other in texts.values())
            idf = max(math.log((len(texts) - n + 0.5) / (n + 0.5)), 1e-6)
            f = words.count(term)
            weight = f * 2.2 / (f + 1.2 * (0.25 + 0.75 * len(words) / mean))
            found[block] = found.get(block, 0.0) + idf * weight
    return found


class MemoryMachine(RuleBasedStateMachine):
    @initialize(
        block=st.integers(2, 5),
        dtype=st.sampled_from(["fp16", "bf16"]),
        key_width=st.integers(0, 2),
    )
    def create(self, block: int, dtype: str, key_width: int) -> None:
        self.directory = Path(tempfile.mkdtemp())
        self.block = block
        self.dtype = torch.float16 if dtype == "fp16" else torch.bfloat16
        identity = MemoryIdentity("base", "tok", "gist", block, WIDTH, key_width, dtype)
        self.memory = Memory.create(self.directory / "m.mctx", identity)
        self.reader = Memory.open(self.memory.path)
        self.tokens: list[int] = []
        self.levels: dict[int, list[float]] = {}
        self.texts: dict[int, list[str]] = {}
        self.spans: list[list[int]] = []
        self.source: int | None = None
        self.generation = 0

    @rule(data=st.data(), n=st.integers(0, 60), indexed=st.booleans(), sourced=st.booleans())
    def append(self, data, n: int, indexed: bool, sourced: bool) -> None:
        before, after = len(self.tokens), len(self.tokens) + n
        added: dict[int, list[float]] = {}
        level = 1
        while new := after // self.block**level - before // self.block**level:
            start = before // self.block**level
            added[level] = [float((start + i) % 97 + level) for i in range(new)]
            level += 1
        columns = {level: torch.tensor(values)[:, None] for level, values in added.items()}
        keys = self.memory.identity.key_width
        texts = []
        if indexed:
            words = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6)
            count = len(added.get(1, []))
            texts = data.draw(st.lists(words, min_size=count, max_size=count))
        if sourced and (self.source is None or self.spans[-1][2] != before):
            self.source = self.memory.begin_source(Source(f"s{before}"))
            if n:
                self.spans.append([self.source, before, before])
        source = self.source if sourced else None
        span = self.memory.append(
            torch.arange(before, after) * 7,
            {level: c.expand(-1, WIDTH) for level, c in columns.items()},
            {level: -c.expand(-1, keys) for level, c in columns.items()} if keys else {},
            {level: c[:, 0] / 128 for level, c in columns.items()},
            [" ".join(words) for words in texts],
            source,
        )
        assert span == (before, after)
        self.generation += n > 0
        if sourced and n:
            self.spans[-1][2] = after
        elif sourced and (not self.spans or self.spans[-1][0] != self.source):
            self.source = None
        self.tokens += [token * 7 for token in range(before, after)]
        first = before // self.block
        self.texts.update({first + i: words for i, words in enumerate(texts)})
        for level, values in added.items():
            self.levels.setdefault(level, []).extend(values)

    @rule(torn=st.booleans(), size=st.integers(1, 9))
    def reopen(self, torn: bool, size: int) -> None:
        path = self.memory.path
        self.memory.close()
        if torn:
            for file in path.glob("*.ctx"):
                with file.open("ab") as raw:
                    raw.write(b"\xa5" * size)
            (path / f"L{size}.g9.ctx").write_bytes(b"left over")
        self.memory = Memory.open(path, "a", expect=self.memory.identity)
        if self.spans:
            self.source = self.spans[-1][0]
        else:
            self.source = None

    @rule(data=st.data(), level=st.integers(0, 4))
    def read(self, data, level: int) -> None:
        count = len(self.levels.get(level, [])) if level else len(self.tokens)
        assert self.memory.count(level) == count
        start = data.draw(st.integers(0, count))
        stop = data.draw(st.integers(start, count))
        if level == 0:
            assert self.memory.tokens(start, stop).tolist() == self.tokens[start:stop]
            return
        column = torch.tensor(self.levels.get(level, [])[start:stop])
        gists = self.memory.gists(level, start, stop)
        assert gists.dtype == self.dtype
        assert torch.equal(gists.float(), column[:, None].expand(-1, WIDTH))
        assert self.memory.fidelity(level, start, stop).tolist() == (column / 128).tolist()
        if keys := self.memory.identity.key_width:
            read = self.memory.keys(level, start, stop).float()
            assert torch.equal(read, -column[:, None].expand(-1, keys))

    @rule(query=st.sets(st.sampled_from([*WORDS, "absent"])), limit=st.integers(0, 30))
    def search(self, query: set[str], limit: int) -> None:
        blocks, scores = self.memory.search_blocks(" ".join(query), limit)
        frequency = {w: sum(w in words for words in self.texts.values()) for w in query}
        common = max(self.memory.count(1) * 0.1, 16)
        rare = {w for w in query if 0 < frequency[w] <= common}
        expected = reference_search(self.texts, rare or query)
        assert len(blocks) == min(limit, len(expected))
        kept = blocks.tolist()
        assert scores.tolist() == pytest.approx([expected[b] for b in kept], rel=1e-5, abs=1e-12)
        best = sorted(expected.values(), reverse=True)[: len(kept)]
        assert scores.tolist() == pytest.approx(best, rel=1e-5, abs=1e-12)

    @rule()
    def refresh_reader(self) -> None:
        newer = self.reader.generation != self.generation
        assert self.reader.refresh() == newer
        assert self.reader.tokens().tolist() == self.tokens

    @rule()
    def verify(self) -> None:
        report = self.memory.verify()
        assert report.ok, report.problems

    @invariant()
    def sizes_agree(self) -> None:
        if not hasattr(self, "memory"):
            return
        assert self.memory.n_tokens == len(self.tokens)
        assert self.memory.generation == self.generation
        assert self.memory.n_levels == 1 + max(self.levels, default=0)
        assert [[s.id, s.start, s.end] for s in self.memory.sources()] == self.spans
        assert self.reader.n_tokens <= len(self.tokens)

    def teardown(self) -> None:
        if hasattr(self, "memory"):
            self.memory.close()
            self.reader.close()
            shutil.rmtree(self.directory)


MemoryMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestMemoryMachine = MemoryMachine.TestCase
