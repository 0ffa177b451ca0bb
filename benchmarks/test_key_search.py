"""Search of a million lens keys: all of them compared, and by an index (extra ``ann``).

Run with ``./bootstrap pytest benchmarks/test_key_search.py -n 0 --benchmark-enable``; the relative
times are the ratios that matter. What an index found of the 16 best keys, how long it took to build
and its bytes stand in the JSON's ``extra_info``.

Keys are what a lens starts from: sums of 40 tokens' random vectors, tokens drawn by Zipf's law and
weighted by inverse document frequency. They lie in no clusters, the hard case for an index. Every
query shares four rare tokens with one block and has ten others.
"""

from __future__ import annotations

import time

import pytest
import torch
from torch.nn import functional as F

from megacontext.memory import KeyIndex, KeyIndexConfig, Memory, MemoryIdentity
from megacontext.memory.key_lists import find_faiss

N_KEYS, WIDTH, BEST, QUERIES, LOOKS = 1_000_000, 96, 16, 4, 16
VOCABULARY, BLOCK_TOKENS = 4096, 40
CHUNK = 50_000

needs_faiss = pytest.mark.skipif(find_faiss() is None, reason="the extra `ann` is not installed")


class Texts:
    """Blocks of random tokens, their keys, and queries after some of them."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        frequency = 1 / (torch.arange(VOCABULARY) + 2.7)
        self.share = frequency / frequency.sum()
        vectors = torch.randn(VOCABULARY, WIDTH, generator=self.generator)
        self.vectors = vectors * torch.log1p(1 / (BLOCK_TOKENS * self.share))[:, None]

    def blocks(self, count: int) -> torch.Tensor:
        drawn = torch.multinomial(self.share, count * BLOCK_TOKENS, True, generator=self.generator)
        return drawn.view(count, BLOCK_TOKENS)

    def keys(self, tokens: torch.Tensor) -> torch.Tensor:
        return F.normalize(F.embedding_bag(tokens, self.vectors, mode="sum"), dim=-1).half()

    def queries(self, block: torch.Tensor) -> torch.Tensor:
        """``[QUERIES, WIDTH]`` that weigh the same words differently."""
        rare = block.sort(descending=True).values[:4]
        words = torch.cat((rare, self.blocks(1)[0, :10]))
        gates = 2 * torch.rand(QUERIES, len(words), generator=self.generator)
        return F.normalize(gates @ self.vectors[words], dim=-1) * WIDTH**0.5


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A memory of a million blocks, and looks into it."""
    identity = MemoryIdentity("none", "none", "none", 2, 1, WIDTH, "fp16")
    texts, looks = Texts(), []
    with Memory.create(tmp_path_factory.mktemp("keys") / "m.mctx", identity) as memory:
        for _ in range(N_KEYS // CHUNK):
            tokens = texts.blocks(CHUNK)
            if len(looks) < LOOKS:
                looks.append(texts.queries(tokens[len(looks)]))
            keys, level, above = {1: texts.keys(tokens)}, 2, memory.n_tokens
            while count := (above + 2 * CHUNK) // 2**level - above // 2**level:
                keys[level] = torch.zeros(count, WIDTH)
                level += 1
            gists = {level: torch.zeros(len(values), 1) for level, values in keys.items()}
            memory.append(torch.zeros(2 * CHUNK, dtype=torch.int64), gists, keys)
        yield memory, looks


def search(index, asked):
    def relevance(keys):
        return (asked @ keys.float().T).amax(dim=0)

    return index.search(asked, BEST, N_KEYS, relevance)[0]


def measure(benchmark, filled, **settings):
    memory, looks = filled
    index = KeyIndex(memory, KeyIndexConfig(**settings))
    started = time.perf_counter()
    index.update()
    benchmark.extra_info["build_s"] = time.perf_counter() - started
    benchmark.extra_info["bytes"] = memory.stats()["bytes"]["key_index"]
    exact = KeyIndex(memory, KeyIndexConfig(flat_keys=N_KEYS))
    best = [search(exact, asked) for asked in looks]
    found = [search(index, asked) for asked in looks]
    pairs = list(zip(found, best, strict=True))
    recall = sum(int(torch.isin(a, b).sum()) for a, b in pairs) / (BEST * len(looks))
    first = sum(int(b[0] in a) for a, b in pairs) / len(looks)
    benchmark.extra_info["recall_at_16"], benchmark.extra_info["best_found"] = recall, first
    benchmark(lambda: [search(index, asked) for asked in looks])
    print(benchmark.name, benchmark.extra_info)
    return recall


@pytest.mark.benchmark(group="16 searches of 1M x 96 keys, 4 queries each", min_rounds=3)
def test_all_keys_are_compared(benchmark, filled):
    assert measure(benchmark, filled, flat_keys=N_KEYS) == 1.0


@needs_faiss
@pytest.mark.benchmark(group="16 searches of 1M x 96 keys, 4 queries each", min_rounds=3)
@pytest.mark.parametrize("rerank", [256, 512, 1024])
def test_index_of_4_bit_codes(benchmark, filled, rerank):
    assert measure(benchmark, filled, flat_keys=16, rerank=rerank) > 0.8


@needs_faiss
@pytest.mark.benchmark(group="16 searches of 1M x 96 keys, 4 queries each", min_rounds=3)
@pytest.mark.parametrize("share", [0.0625, 0.25])
def test_index_of_whole_keys(benchmark, filled, share):
    settings = {"codes": "fp16", "rerank": 24, "probe_share": share}
    assert measure(benchmark, filled, flat_keys=16, **settings) > 0.1
