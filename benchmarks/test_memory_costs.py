"""A memory's own costs: commits of one block, counts of terms behind them, searches of all keys.

Run with ``./bootstrap pytest benchmarks/test_memory_costs.py -n 0 --benchmark-enable``; within a
group the relative times are the ratios that matter. ``MEMORY_COSTS_BLOCKS`` says how large the
memory is (default: 60,000 blocks, 1.9 million tokens).

Texts are words drawn by Zipf's law; keys and gists are random.
"""

from __future__ import annotations

import os

import pytest
import torch

from megacontext.memory import KeyIndex, KeyIndexConfig, Memory, MemoryIdentity, Source
from megacontext.memory.file_set import FileSet

BLOCKS = int(os.environ.get("MEMORY_COSTS_BLOCKS", "60000"))
BLOCK, WIDTH, BEST, WORDS_PER_BLOCK, VOCABULARY = 32, 96, 16, 22, 30_000
CHUNK = 5_000
# Frequent, middling and rare ones, as in a question.
ASKED = [f"w{rank}" for rank in (0, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000)]


class Writer:
    """Appends blocks with all that belongs to them."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.generator = torch.Generator().manual_seed(0)
        self.share = 1 / (torch.arange(VOCABULARY) + 2.7)
        self.source = memory.begin_source(Source("bench:"))

    def blocks(self, count: int) -> None:
        have, n = self.memory.n_tokens, BLOCK * count
        new, level = {}, 1
        while (have + n) // BLOCK**level:
            new[level] = (have + n) // BLOCK**level - have // BLOCK**level
            level += 1
        vectors = {
            level: torch.randn(m, WIDTH, generator=self.generator) for level, m in new.items() if m
        }
        words = torch.multinomial(
            self.share, count * WORDS_PER_BLOCK, True, generator=self.generator
        )
        texts = [
            " ".join(f"w{word}" for word in row)
            for row in words.view(count, WORDS_PER_BLOCK).tolist()
        ]
        tokens = torch.randint(0, 4096, (n,), generator=self.generator)
        self.memory.append(tokens, vectors, vectors, None, texts, self.source)


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    identity = MemoryIdentity("none", "none", "none", BLOCK, WIDTH, WIDTH, "fp16")
    with Memory.create(tmp_path_factory.mktemp("costs") / "m.mctx", identity) as memory:
        writer = Writer(memory)
        for first in range(0, BLOCKS, CHUNK):
            writer.blocks(min(CHUNK, BLOCKS - first))
        yield writer


def one_after_the_other(_, files):
    for file in files:
        file.fsync()


@pytest.mark.benchmark(group="commit of one block")
@pytest.mark.parametrize("syncs", ["at the same time", "one after the other", "none"])
def test_commit(benchmark, writer, monkeypatch, syncs):
    if syncs != "at the same time":
        sync = one_after_the_other if syncs == "one after the other" else lambda *_: None
        monkeypatch.setattr(FileSet, "_sync_files", sync)
    before = writer.memory.generation
    benchmark.pedantic(writer.blocks, (1,), rounds=100, warmup_rounds=3)
    assert writer.memory.generation > before


@pytest.mark.benchmark(group="weights of ten terms behind a commit")
@pytest.mark.parametrize("counts", ["carried over", "counted anew"])
def test_weights(benchmark, writer, counts):
    memory, lexical = writer.memory, writer.memory._catalog.lexical
    memory.term_weights(ASKED)

    def commit() -> None:
        writer.blocks(1)
        if counts == "counted anew":
            lexical._frequencies_of = -1

    weights = benchmark.pedantic(memory.term_weights, (ASKED,), setup=commit, rounds=50)
    assert 0 < weights["w0"] < weights["w10000"]


@pytest.mark.benchmark(group="search of all keys", min_rounds=10)
@pytest.mark.parametrize("resident_mb", [None, 64, 16])
def test_search(benchmark, writer, resident_mb):
    asked = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))

    def relevance(keys):
        parts = [(asked @ part.float().T).amax(dim=0) for part in keys.split(8192)]
        return torch.cat(parts)

    with Memory.open(writer.memory.path, resident_mb=resident_mb) as memory:
        index = KeyIndex(memory, KeyIndexConfig(flat_keys=1 << 40))
        found, _ = benchmark(index.search, asked, BEST, memory.count(1), relevance)
    assert len(found) == BEST
