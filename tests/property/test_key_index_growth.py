"""Whatever a memory grows by and whatever becomes of its index, looking everywhere is exact."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.memory import KeyIndex, KeyIndexConfig, Memory
from megacontext.memory.key_index_file import INDEX_NAME
from megacontext.memory.key_lists import find_faiss
from tools._memory_script import IDENTITY, append

WIDTH = 6

steps = st.one_of(
    st.integers(1, 60).map(lambda blocks: ("grow", blocks)),
    st.tuples(st.just("search"), st.floats(0, 1), st.integers(1, 30)),
    st.floats(0, 0.999).map(lambda share: ("flip", share)),
    st.sampled_from([("reopen",), ("lose",), ("read",)]),
)


def flat(memory, asked, k, n):
    found = (asked @ memory.keys(1, 0, n).float().T).amax(dim=0)
    return found.topk(min(k, n))


def check(index, k, n, seed):
    asked = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
    blocks, value = index.search(asked, k, n, lambda keys: (asked @ keys.float().T).amax(dim=0))
    wanted = flat(index.memory, asked, k, n)
    torch.testing.assert_close(value, wanted.values)
    assert set(blocks.tolist()) == set(wanted.indices.tolist())


@pytest.mark.skipif(find_faiss() is None, reason="the extra `ann` is not installed")
@settings(max_examples=15, deadline=None)
@given(
    st.lists(steps, max_size=8),
    st.integers(16, 80),
    st.sampled_from(["pq4", "fp16"]),
    st.sampled_from([0.05, 0.5, 1.0]),
    st.sampled_from([1.25, 4.0]),
)
def test_it_agrees_with_comparing_all_keys(done, flat_keys, codes, share, growth):
    config = KeyIndexConfig(
        flat_keys=flat_keys,
        codes=codes,
        rerank=1 << 20,
        flat_share=share,
        growth=growth,
        reader_searches=1,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.mctx"
        memory = Memory.create(path, replace(IDENTITY, block_size=2, key_width=WIDTH))
        try:
            append(memory, 40)
            index = KeyIndex(memory, config)
            for seed, (step, *values) in enumerate([*done, ("search", 1.0, 16)]):
                if step == "grow":
                    append(memory, 2 * values[0])
                elif step == "search":
                    n = round(values[0] * memory.count(1))
                    check(index, min(values[1], n // 2), n, seed)
                elif step == "reopen":
                    memory.close()
                    memory = Memory.open(path, "a")
                    index = KeyIndex(memory, config)
                elif step == "read":
                    with Memory.open(path) as reader:
                        for _ in range(3):
                            check(KeyIndex(reader, config), 4, reader.count(1), seed)
                elif (path / INDEX_NAME).exists():
                    if step == "lose":
                        (path / INDEX_NAME).unlink()
                        continue
                    raw = bytearray((path / INDEX_NAME).read_bytes())
                    raw[int(values[0] * len(raw))] ^= 0x10
                    (path / INDEX_NAME).write_bytes(raw)
        finally:
            memory.close()
