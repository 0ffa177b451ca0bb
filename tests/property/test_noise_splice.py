"""A spliced history is the noise with the statements in it: nothing lost, moved or cut."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_base_model

from megacontext.evaluation.noise import NoiseTokens

BASE = tiny_base_model()
SENTENCES = st.lists(st.sampled_from(["Aa.", "Bbb bb?", '"Cc!"', "Dd\n\nEe.", "Ff"]), min_size=1)
STATEMENTS = st.lists(st.text(alphabet="xyz", min_size=1, max_size=8), max_size=12)
SEEDS = st.integers(0, 2**32 - 1)


@given(
    texts=st.lists(SENTENCES, min_size=1, max_size=3),
    statements=STATEMENTS,
    tokens=st.integers(0, 400),
    seed=SEEDS,
    data=st.data(),
)
def test_a_history_is_noise_with_statements_between_its_sentences(
    texts, statements, tokens, seed, data
):
    noise = NoiseTokens(BASE, [" ".join(text) for text in texts])
    ids = [noise.encode(statement) for statement in statements]
    depths = None
    if data.draw(st.booleans()):
        depth = st.floats(0, 1)
        depths = sorted(data.draw(st.lists(depth, min_size=len(ids), max_size=len(ids))))
    length = sum(map(len, ids)) + tokens
    history, spans = noise.splice(random.Random(seed), ids, length, depths=depths)
    again, same_spans = noise.splice(random.Random(seed), ids, length, depths=depths)
    assert history.equal(again)
    assert spans == same_spans
    assert history.dtype == torch.int64
    assert len(history) == length
    assert all(history[a:b].equal(part) for (a, b), part in zip(spans, ids, strict=True))
    ends = [0, *(end for _, end in spans)]
    assert all(start >= end for (start, _), end in zip(spans, ends, strict=False))
    # Without the statements, it is what the same generator draws.
    kept = torch.ones(length, dtype=torch.bool)
    for start, end in spans:
        kept[start:end] = False
    drawn = noise.draw(random.Random(seed), tokens)
    assert history[kept].equal(drawn)
    # Every statement stands where a sentence begins, whichever sentence the noise starts with.
    begins = set(noise.sentence_starts.tolist())
    places = [int(kept[:start].sum()) for start, _ in spans]
    assert any(
        noise._cut(start, tokens).equal(drawn)
        and all((start + place) % len(noise) in begins for place in places)
        for start in begins
    )
