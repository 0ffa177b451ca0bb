"""New gists for an old memory."""

from __future__ import annotations

import pytest
from engine_cases import config, contents, learned_gistnet, new_engine, words
from tiny_models import tiny_base_model

from megacontext.errors import MemoryMismatchError, ReadOnlyMemoryError
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet, LensNetConfig
from megacontext.memory import Memory, Source
from megacontext.runtime.engine import Engine
from megacontext.runtime.regist import regist


@pytest.mark.parametrize("with_lens", [False, True])
def test_the_gists_of_a_fresh_ingest(base, with_lens, tmp_path):
    net = learned_gistnet(base, slots=2)
    lens = LensNet(LensNetConfig(d_model=base.d_model, key_width=16)).eval() if with_lens else None
    text = words(1100)
    old = new_engine(tmp_path, base, name="old")
    old.ingest(text[:700], Source(uri="one"))
    old.ingest(text[700:], Source(uri="two"))
    before = contents(old.memory)
    steps = []
    regist(base, old.memory, net, lens, lambda level, count: steps.append((level, count)))
    assert steps == [(1, 34), (2, 1)]
    assert contents(old.memory)["gists 1"] != before["gists 1"]
    assert contents(old.memory)["tokens"] == before["tokens"]
    assert [(s.uri, s.start, s.end) for s in old.memory.sources()] == [
        ("one", 0, 700),
        ("two", 700, 1100),
    ]
    fresh = new_engine(tmp_path, base, name="fresh", gistnet=net, lens=lens)
    fresh.ingest(text)
    assert contents(old.memory) == contents(fresh.memory)
    assert old.memory.identity == fresh.memory.identity
    old.memory.close()
    with Memory.open(tmp_path / "old.mctx") as memory:
        with pytest.raises(MemoryMismatchError):
            Engine(base, memory, config=config())
        engine = Engine(base, memory, gistnet=net, lens=lens, config=config())
        options = {"max_new_tokens": 5, "eos_token_id": (), "remember": False}
        answers = [[t.id for t in e.generate("so? ", **options)] for e in (engine, fresh)]
        assert answers[0] == answers[1]
        assert memory.verify().ok


def test_ingest_goes_on_after_it(base, tmp_path):
    net, text = learned_gistnet(base), words(1300)
    old = new_engine(tmp_path, base, name="old")
    old.ingest(text[:1000])
    regist(base, old.memory, net)
    again = Engine(base, old.memory, gistnet=net, config=config())
    again.ingest(text[1000:])
    fresh = new_engine(tmp_path, base, name="fresh", gistnet=net)
    fresh.ingest(text)
    assert contents(old.memory) == contents(fresh.memory)


def test_an_empty_memory(base, tmp_path):
    engine = new_engine(tmp_path, base)
    regist(base, engine.memory, learned_gistnet(base))
    assert engine.memory.identity.gist_version == learned_gistnet(base).version


def test_another_base_or_block_size_is_refused(base, tmp_path):
    engine = new_engine(tmp_path, base)
    engine.ingest(words(100))
    before = contents(engine.memory)
    with pytest.raises(MemoryMismatchError, match="base_model"):
        regist(tiny_base_model("llama"), engine.memory, learned_gistnet(base))
    with pytest.raises(MemoryMismatchError, match="block_size"):
        regist(base, engine.memory, GistNet.untrained(base.d_model, block_size=16))
    assert contents(engine.memory) == before
    engine.memory.close()
    with Memory.open(tmp_path / "a.mctx") as reader, pytest.raises(ReadOnlyMemoryError):
        regist(base, reader, learned_gistnet(base))
