from __future__ import annotations

import torch
from tiny_models import tiny_base_model
from transformers import GenerationConfig

from megacontext.runtime.plain_decode import decode_plain, raw_context
from megacontext.runtime.sampling import TokenSampler


def greedy(base, **settings):
    return TokenSampler(GenerationConfig(do_sample=False, **settings))


def test_it_writes_what_the_model_itself_generates():
    base = tiny_base_model("llama")
    ids = base.encode("The king")
    expected = base.model.generate(ids[None], max_new_tokens=12, do_sample=False)[0, len(ids) :]
    tokens = list(
        decode_plain(
            base, base.prefill(raw_context(base, ids), keep=1), ids, greedy(base), max_new_tokens=12
        )
    )
    assert [token.id for token in tokens] == expected.tolist()
    assert "".join(token.text for token in tokens) == base.decode(expected)
    assert [token.index for token in tokens] == list(range(len(ids), len(ids) + 12))


def test_it_ends_before_the_stop_text():
    base = tiny_base_model("llama")
    ids = base.encode("The king")
    reading = raw_context(base, ids)
    whole = "".join(
        t.text
        for t in decode_plain(
            base, base.prefill(reading, keep=1), ids, greedy(base), max_new_tokens=20
        )
    )
    stop = whole[4:6]
    cut = "".join(
        t.text
        for t in decode_plain(
            base, base.prefill(reading, keep=1), ids, greedy(base), max_new_tokens=20, stop=stop
        )
    )
    assert cut == whole[: whole.index(stop)]


def test_it_ends_at_the_end_token():
    base = tiny_base_model("llama")
    ids = base.encode("The king")
    reading = raw_context(base, ids)
    first, second = (
        t.id
        for t in decode_plain(
            base, base.prefill(reading, keep=1), ids, greedy(base), max_new_tokens=2
        )
    )
    ended = greedy(base, eos_token_id=second)
    tokens = list(decode_plain(base, base.prefill(reading, keep=1), ids, ended, max_new_tokens=9))
    assert [t.id for t in tokens] == ([first] if first != second else [])


def test_the_reading_is_left_as_it_was():
    base = tiny_base_model("llama")
    ids = torch.tensor([5, 6, 7])
    reading = raw_context(base, ids)
    before = reading.embeddings.clone()
    list(decode_plain(base, base.prefill(reading, keep=1), ids, greedy(base), max_new_tokens=3))
    assert torch.equal(reading.embeddings, before)
    assert len(reading) == 3
