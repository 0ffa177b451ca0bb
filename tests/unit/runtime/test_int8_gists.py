"""A memory whose gists are int8: everything that can be done to a memory works with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_cases import config, learned_gistnet, words
from tiny_models import save_tiny_model

from megacontext.errors import MemoryMismatchError
from megacontext.memory import Memory, Source
from megacontext.runtime.engine import Engine
from megacontext.runtime.forget import forget
from megacontext.runtime.regist import regist
from megacontext.runtime.repair import repair
from megacontext.runtime.session import Session, SessionConfig
from tools._memory_script import describe

TEXTS = (words(1500), words(700, seed=1), words(90, seed=2))


@pytest.fixture(scope="module")
def net(base):
    return learned_gistnet(base)


def filled(folder, base, net, texts=TEXTS, *, dtype="int8", chunk_tokens=16_384) -> Memory:
    identity = replace(Engine.identity(base, net), gist_dtype=dtype)
    path = folder / f"{dtype}.{chunk_tokens}.{len(texts)}.mctx"
    memory = Memory.create(path, identity)
    engine = Engine(base, memory, gistnet=net, config=config(chunk_tokens=chunk_tokens))
    for text in texts:
        engine.ingest(text, Source(str(TEXTS.index(text))))
    return memory


def test_gists_are_near_those_of_fp16_and_half_as_large(tmp_path, base, net):
    with (
        filled(tmp_path, base, net) as small,
        filled(tmp_path, base, net, dtype="fp16") as large,
    ):
        assert small.verify().ok
        assert small.identity.gist_dtype == "int8"
        for level in range(1, small.n_levels):
            read, full = small.gists(level), large.gists(level).float()
            assert read.dtype == torch.float32
            assert float((read - full).norm() / full.norm()) < 0.02
            assert not torch.equal(read, full)
        sizes = [memory.stats()["bytes"]["gists"] for memory in (small, large)]
        assert sizes[0] < 0.6 * sizes[1]


def test_gists_do_not_depend_on_commits(tmp_path, base, net):
    with (
        filled(tmp_path, base, net) as once,
        filled(tmp_path, base, net, chunk_tokens=48) as often,
    ):
        assert describe(once) == describe(often)


def test_the_engine_answers_from_it_and_needs_not_be_told(tmp_path, base, net):
    with filled(tmp_path, base, net) as memory:
        engine = Engine(base, memory, gistnet=net, config=config())
        assert engine.memory is memory
        assert engine.ask("amber", max_new_tokens=4, seed=1) == engine.ask(
            "amber", max_new_tokens=4, seed=1
        )
        assert any(engine.context.levels > 0)


def test_regist_converts_and_keeps_the_format_otherwise(tmp_path, base, net):
    with (
        filled(tmp_path, base, net) as small,
        filled(tmp_path, base, net, dtype="fp16") as large,
    ):
        wanted, before = describe(small), describe(large)
        regist(base, large, net, gist_dtype="int8")
        assert describe(large) == wanted
        regist(base, large, net)
        assert describe(large) == wanted
        regist(base, large, net, gist_dtype="fp16")
        assert describe(large) == before
        assert large.verify().ok


def test_forget_and_repair_keep_the_format(tmp_path, base, net):
    with filled(tmp_path, base, net, TEXTS[:1] + TEXTS[2:]) as memory:
        said = describe(memory)
    memory = filled(tmp_path, base, net)
    memory.close()
    forget(base, memory.path, ["1"], net)
    with Memory.open(memory.path) as rest:
        found = describe(rest)
    for told in (said, found):
        told["sources"] = [source[1:] for source in told["sources"]]
    assert found == said
    gists = memory.path / "L1.ctx"
    raw = bytearray(gists.read_bytes())
    raw[70] ^= 1
    gists.write_bytes(raw)
    (problem, *_) = Memory.verify_path(memory.path).problems
    assert problem.path.name == "L1.ctx"
    assert repair(base, memory.path, net).doubts == ()
    with Memory.open(memory.path) as again:
        repaired = describe(again)
        assert again.verify().ok
    repaired["sources"] = [source[1:] for source in repaired["sources"]]
    assert repaired == said


def test_a_session_makes_it_and_refuses_another_format(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    options = {"model": str(model), "engine": {"budget": 64, "tail_tokens": 32}}
    path = tmp_path / "m.mctx"
    with Session(SessionConfig.parse({**options, "gist_dtype": "int8"})) as session:
        with session.create(path).memory as memory:
            assert memory.identity.gist_dtype == "int8"
        session.open(path, writable=True).memory.close()
    with Session(SessionConfig.parse(options)) as session:
        session.open(path, writable=False).memory.close()
    with (
        Session(SessionConfig.parse({**options, "gist_dtype": "bf16"})) as session,
        pytest.raises(MemoryMismatchError, match=r"gists are int8, not bf16.*regist"),
    ):
        session.open(path, writable=True)
    Memory.open(path, "a").close()
