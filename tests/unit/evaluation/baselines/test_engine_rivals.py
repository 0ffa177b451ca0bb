"""MegaContext and its variants: gists without focus, focus without gists, oracle focus."""

from __future__ import annotations

import pytest
import torch
from engine_cases import learned_gistnet, new_engine, words

from megacontext.evaluation.baselines import rivals
from megacontext.lensnet import LensNet, LensNetConfig
from megacontext.runtime.engine import Engine

NOTHING = torch.empty(0, dtype=torch.int64)


def one(name, base, memory, habits, gistnet=None):
    (rival,) = rivals([name], base, memory, gistnet, config=habits)
    return rival


def haystack():
    return words(319, seed=1) + " zebra quartz " + words(600, seed=2)


def test_megacontext_is_the_engine_itself(base, remember, habits):
    memory = remember(base, haystack())
    rival = one("megacontext", base, memory, habits)
    answer = rival.answer("\nzebra? ", "zebra", max_new_tokens=40, stop="\0")
    engine = Engine(base, memory, config=habits.engine)
    expected = engine.ask(
        "\nzebra? ", max_new_tokens=40, stop="\0", query="zebra", look_again=habits.look_again
    )
    assert answer == expected
    assert any(start <= 320 and end >= 332 for start, end in rival.raw_spans)


def test_nll_follows_a_stream_as_the_engine_does(base, remember, habits):
    memory = remember(base, haystack())
    rival = one("megacontext", base, memory, habits)
    rival.nll(300, memory.tokens(300, 310).long())
    spans = {}
    for cursor in range(310, 500, 10):
        rival.nll(cursor, memory.tokens(cursor, cursor + 10).long())
        context = rival.engine.context
        assert context.cursor == cursor
        assert context.cost + 10 <= 192
        spans[cursor] = rival.raw_spans
    assert spans[490][0][0] > 0, "what is old has become gists"
    fresh = one("megacontext", base, memory, habits)
    back = rival.nll(300, memory.tokens(300, 310).long())
    torch.testing.assert_close(back, fresh.nll(300, memory.tokens(300, 310).long()))


@pytest.mark.parametrize("reader", ["embedding", "kv"])
def test_focus_without_gists_reads_the_same_blocks_and_no_gist(base, remember, habits, reader):
    gistnet = learned_gistnet(base, reader=reader)
    memory = remember(base, haystack(), gistnet)
    blind, seeing = (one(n, base, memory, habits, gistnet) for n in ("focus_only", "megacontext"))
    for rival in (blind, seeing):
        rival.answer("\nzebra? ", "zebra", max_new_tokens=4, stop="\0")
    assert blind.raw_spans == seeing.raw_spans
    assert any(start <= 320 and end >= 332 for start, end in blind.raw_spans)
    prompt = base.encode("?")
    context = blind.engine.context
    reading = blind.reader.read(context, prompt)
    raw = context.spans()[context.levels == 0, 1:].tolist()
    ids = torch.cat([memory.tokens(a, b).long() for a, b in raw] + [prompt])
    torch.testing.assert_close(reading.embeddings, base.embed(ids))
    assert reading.positions.tolist() == list(range(len(ids)))
    assert reading.n_gists == 0
    assert len(seeing.reader.read(context, prompt)) > len(reading)


def test_focus_without_gists_decides_as_if_there_were_gists(base, remember, habits):
    memory = remember(base, haystack())
    config = habits.model_copy(update={"policy": "attention"})
    blind, seeing = (one(n, base, memory, config) for n in ("focus_only", "megacontext"))
    for rival in (blind, seeing):
        rival.nll(700, memory.tokens(700, 710).long())
    assert blind.raw_spans == seeing.raw_spans


def test_gists_without_focus_keeps_the_newest_raw_whatever_is_asked(base, remember, habits):
    memory = remember(base, haystack())
    rival = one("gists_only", base, memory, habits)
    rival.answer("\nzebra? ", "zebra", max_new_tokens=4, stop="\0")
    assert len(rival.raw_spans) == 1
    start, end = rival.raw_spans[0]
    assert end == memory.n_tokens
    assert end - start > 32 + 32, "more than the tail: what the budget allows"
    context = rival.reader.first
    assert context is not None
    assert bool((context.levels > 0).any())
    assert context.cost + 8 + 32 <= 192
    rival.answer("\namber? ", "amber", max_new_tokens=4, stop="\0")
    assert rival.raw_spans == [(start, end)]


def test_the_oracle_is_told_before_every_question(base, remember, habits):
    memory = remember(base, haystack())
    rival = one("oracle", base, memory, habits)
    rival.inform("iris", [(320, 332), (95, 97)])
    rival.answer("\nwhat? ", "what", max_new_tokens=4, stop="\0")
    policy = rival.engine.focus.policy
    assert policy.hints == (2, 3, 10)
    assert base.decode(policy.future) == " iris\0"
    targets = memory.tokens(600, 616).long()
    better = rival.nll(600, targets)
    plain = one("gists_only", base, memory, habits).nll(600, targets)
    assert torch.equal(rival.engine.focus.policy.future, targets)
    assert float(better.sum()) <= float(plain.sum()) + 1e-3


def test_the_policy_is_a_lens_where_there_is_one(base, habits, tmp_path):
    config = LensNetConfig(
        d_model=base.d_model, key_width=16, d_hidden=32, n_layers=1, d_ff=32, lexical_prior=1.0
    )
    lens = LensNet(config).eval().requires_grad_(False)
    engine = new_engine(tmp_path, base, lens=lens)
    with engine.memory as memory:
        engine.ingest(haystack())
        names = ["megacontext", "focus_only", "megacontext.lens", "megacontext.lexical"]
        made = rivals(names, base, memory, None, lens, habits)
        policies = [rival.engine.focus.policy.name for rival in made]
        assert policies == ["lens", "lens", "lens", "lexical"]
        made[0].answer("\nzebra? ", "zebra", max_new_tokens=2)
        assert any(start <= 320 and end >= 332 for start, end in made[0].raw_spans)
