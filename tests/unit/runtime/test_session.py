"""From a configuration to engines."""

from __future__ import annotations

import itertools

import pytest
from engine_cases import config, words
from tiny_models import save_tiny_model, tiny_base_model

from megacontext.config import load_config
from megacontext.errors import (
    CheckpointError,
    ConfigError,
    MemoryMismatchError,
    ModelNotFoundError,
)
from megacontext.gistnet import GistNet, GistNetConfig
from megacontext.lensnet import LensNet, LensNetConfig
from megacontext.memory import Memory
from megacontext.runtime.session import DecodeConfig, Session, SessionConfig
from megacontext.telemetry import read_events

SMALL = config(budget=128)
KINDS = {"ingest", "gist", "commit", "score", "edit", "refocus", "decode"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model")))


def settings(model, **changes):
    return SessionConfig.parse({"model": model, "engine": SMALL, **changes})


@pytest.mark.parametrize(
    "wrong",
    [
        {"policy": "oracle"},
        {"engine": {"budget": 32}},
        {"engine": {"positions": "random"}},
        {"engine": {"allocator": {"cooldown": -1}}},
        {"unknown": 1},
    ],
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SessionConfig.parse(wrong)


def test_settings_from_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("policy: recency\nengine: {budget: 512}\n")
    read = load_config(SessionConfig, path, ["engine.tail_tokens=64"])
    assert (read.policy, read.engine.budget, read.engine.tail_tokens) == ("recency", 512, 64)


@pytest.mark.parametrize("policy", ["recency", "lexical", "attention", "lens"])
def test_every_policy_answers(model, policy, tmp_path):
    with Session(settings(model, policy=policy)) as session:
        engine = session.create(tmp_path / "a.mctx")
        with engine.memory:
            engine.ingest(words(400))
            assert engine.focus.policy.name == policy
            assert isinstance(engine.ask("amber? ", max_new_tokens=3), str)
            assert engine.state().rounds > 0


def test_a_memory_serves_every_policy_without_keys(model, tmp_path):
    path = tmp_path / "a.mctx"
    with Session(settings(model)) as session, session.create(path).memory:
        pass
    for policy in ("lens", "attention"):
        with Session(settings(model, policy=policy)) as session:
            session.open(path, writable=True).memory.close()


def test_checkpoints(model, tmp_path):
    base = tiny_base_model()
    net = GistNet(GistNetConfig(kind="transformer", d_model=base.d_model, n_heads=2))
    net.save_pretrained(tmp_path / "gistnet")
    LensNet(LensNetConfig(d_model=base.d_model, key_width=16)).save_pretrained(tmp_path / "lens")
    own = settings(model, gistnet=tmp_path / "gistnet", lens=tmp_path / "lens", policy="lens")
    with Session(own) as session:
        engine = session.create(tmp_path / "a.mctx")
        engine.ingest(words(300))
        assert engine.gistnet.version == net.version
        assert engine.memory.keys(1).shape == (300 // 32, 16)
        assert engine.focus.policy.lens is session.lens
        engine.ask("amber? ", max_new_tokens=2)
        engine.memory.close()
    mismatch = pytest.raises(MemoryMismatchError, match="megacontext regist")
    with Session(settings(model)) as session, mismatch:
        session.open(tmp_path / "a.mctx", writable=False)


def test_what_cannot_be_loaded(model, tmp_path):
    with pytest.raises(ModelNotFoundError):
        Session(settings(str(tmp_path / "nothing")))
    with pytest.raises(CheckpointError):
        Session(settings(model, gistnet=tmp_path / "nothing"))


def test_an_engine_that_cannot_be_made_leaves_the_memory_unlocked(model, tmp_path):
    path = tmp_path / "a.mctx"
    with Session(settings(model)) as session:
        session.create(path).memory.close()
    with Session(settings(model, engine=config(budget=4096))) as session:
        for attempt in (
            lambda: session.open(path, writable=True),
            lambda: session.create(path / "b"),
        ):
            with pytest.raises(ConfigError, match="positions"):
                attempt()
    Memory.open(path, "a").close()


def test_telemetry_of_a_session(model, tmp_path):
    path = tmp_path / "events.jsonl"
    with Session(settings(model, telemetry=path)) as session:
        engine = session.create(tmp_path / "a.mctx")
        with engine.memory:
            text = words(300) + "the zebra sleeps in the barn. " + words(1200, seed=1)
            for _ in engine.stream(text):
                pass
            engine.refocus("zebra")
            list(engine.generate("amber? ", max_new_tokens=34, eos_token_id=()))
            n_tokens, generation = engine.memory.n_tokens, engine.memory.generation
    events = list(read_events(path))
    assert {event.kind for event in events} == KINDS
    assert [event.sequence for event in events] == list(range(len(events)))
    ingested = [event for event in events if event.kind == "ingest"]
    assert sum(event.tokens for event in ingested) == n_tokens
    commits = [event for event in events if event.kind == "commit"]
    assert commits[-1].tokens == n_tokens
    assert commits[-1].generation == generation
    refocuses = [event for event in events if event.kind == "refocus"]
    assert {event.reason for event in refocuses} == {"stream", "request", "decode"}
    assert [event.round for event in refocuses] == list(range(1, len(refocuses) + 1))
    for event in refocuses:
        assert event.cost <= event.budget
        assert (event.recomputed > 0) == (event.reason == "decode")
    for event in events:
        if event.kind == "edit":
            removed, added = event.removed, event.added
            assert (removed[0].start, removed[-1].end) == (added[0].start, added[-1].end)
            for spans in (removed, added):
                assert all(a.end == b.start for a, b in itertools.pairwise(spans))
            assert (event.cost_change > 0) == (event.action == "expand")
            more = len(added) - len(removed)
            assert more == 0 or (more > 0) == (event.action == "expand")
    assert "zebra" not in path.read_text(), "no text unless asked for"


def test_decode_options_leave_the_rest_to_the_model():
    habits = {"max_new_tokens": 128, "stop": "", "look_again": ".", "seed": 0}
    assert DecodeConfig().options() == habits
    chosen = DecodeConfig(do_sample=True, temperature=0.5, look_again="")
    assert chosen.options() == habits | {
        "look_again": "",
        "do_sample": True,
        "temperature": 0.5,
    }
    for wrong in ({"temperature": 0}, {"look_again": None}, {"look_agin": "."}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            DecodeConfig.parse(wrong)


def test_how_often_to_look_is_decided_by_the_decoding(model, tmp_path):
    with Session(settings(model)) as session:
        engine = session.create(tmp_path / "a.mctx")
        engine.ingest(words(600))
        rounds = []
        text = ""
        for look_again in ("", "letter"):
            decode = DecodeConfig(
                max_new_tokens=20, look_again=text[:1] if look_again else "", do_sample=False
            )
            before = engine.state().rounds
            tokens = list(
                engine.generate("amber? ", remember=False, eos_token_id=(), **decode.options())
            )
            text = next(t.text for t in tokens if t.text.isascii() and t.text.strip())
            rounds.append(engine.state().rounds - before)
        engine.memory.close()
    assert rounds[1] > rounds[0]
