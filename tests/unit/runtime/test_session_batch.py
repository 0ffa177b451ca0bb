"""Sessions decoded together, against each of them by itself."""

from __future__ import annotations

import doctest

import pytest
import tiny_models
import torch
from engine_cases import config, learned_gistnet, new_engine, words
from tiny_models import tiny_base_model
from transformers.models.llama import LlamaConfig

from megacontext.errors import InputError, ModelError
from megacontext.memory import Memory
from megacontext.runtime import session_batch
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine, EngineConfig
from megacontext.runtime.sampling import TokenSampler
from megacontext.runtime.session import Session, SessionConfig
from megacontext.runtime.session_batch import SessionBatch
from megacontext.telemetry import MemorySink, Telemetry

TOLERANCE = 1e-4
# A random model would say one token for ever.
OPTIONS = {"eos_token_id": (), "repetition_penalty": 1.3}
TOLD = words(400) + "the zebra sleeps in the blue barn. " + words(300, seed=1)


def told(folder, base, text=TOLD, name="a", **options):
    engine = new_engine(folder, base, name=name, **options)
    engine.ingest(text)
    return engine


def four_sessions(folder, base):
    """Engines, prompts and options that differ in whatever can differ."""
    rotates = base.name != "tiny-gpt2"
    kv = "incremental" if rotates else "exact"
    net = learned_gistnet(base, slots=2) if rotates else None
    engines = [
        told(folder, base, name="0", config=config(kv="exact", budget=224), gistnet=net),
        told(folder, base, words(90, seed=2), name="1", config=config(kv=kv)),
        told(folder, base, TOLD[:600], name="2", config=config(kv=kv, budget=200), gistnet=net),
        told(folder, base, words(500), name="3", config=config(kv="exact", positions="packed")),
    ]
    sampled = {"do_sample": True, "temperature": 2.0, "seed": 3}
    asked = [
        ("where is the zebra? ", {"query": "zebra barn", "remember": False, "max_new_tokens": 40}),
        ("amber ", {"max_new_tokens": 40}),
        # Half of all byte tokens are no character by themselves: the focus looks again and again.
        ("so? ", {"max_new_tokens": 14, "look_again": "\ufffd", **sampled}),
        ("", {"max_new_tokens": 9, "remember": False}),
    ]
    return [(engine, *rest) for engine, rest in zip(engines, asked, strict=True)]


def watched_logits(monkeypatch):
    """The logits that each sampler chooses from, in the order of the samplers' first choices."""
    seen = {}
    choose = TokenSampler.choose

    def watching(self, logits, context_ids):
        seen.setdefault(self, []).append(logits.clone())
        return choose(self, logits, context_ids)

    monkeypatch.setattr(TokenSampler, "choose", watching)
    return seen


def add(batch, engine, prompt="so? ", **options):
    return batch.add(engine, prompt, **OPTIONS | options)


def alone(engine, prompt="so? ", **options):
    return list(engine.generate(prompt, **OPTIONS | options))


def text_of(tokens):
    """Without the rounds, which go on counting in one session."""
    return [(token.id, token.text, token.index) for token in tokens]


def heard(batch, answers=None):
    answers = {} if answers is None else answers
    for index, token in batch:
        answers.setdefault(index, []).append(token)
    return answers


def left_behind(engine):
    """What a session has looked for, where it stands and what it remembers."""
    return (
        [(r.round, r.cursor, r.edits, r.spans.tolist()) for r in engine.focus.records],
        engine.context.spans().tolist(),
        engine.memory.tokens().tolist(),
    )


def check_against_alone(folder, base, monkeypatch, sessions=four_sessions):
    logits = watched_logits(monkeypatch)
    (folder / "alone").mkdir()
    expected = []
    for engine, prompt, options in sessions(folder / "alone", base):
        expected.append((alone(engine, prompt, **options), left_behind(engine)))
    expected_logits = list(logits.values())
    logits.clear()
    together = sessions(folder, base)
    with SessionBatch(base) as batch:
        for engine, prompt, options in together:
            add(batch, engine, prompt, **options)
        answers = heard(batch)
    for index, (engine, _, _) in enumerate(together):
        tokens, traces = expected[index]
        assert answers[index] == tokens
        assert left_behind(engine) == traces
    for own, others in zip(logits.values(), expected_logits, strict=True):
        assert (torch.stack(own) - torch.stack(others)).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", ["qwen3", "mixtral-sliding", "gemma2", "gpt2"])
def test_each_answer_is_that_of_the_session_alone(name, tmp_path, monkeypatch):
    base = tiny_base_model(name, max_positions=256)
    check_against_alone(tmp_path, base, monkeypatch)


def test_the_bundled_model(tmp_path, monkeypatch):
    engine = EngineConfig(budget=256, tail_tokens=64)

    def sessions(folder, base):
        texts = [
            "The secret code of the rusty lantern is 48213. " + words(3000),
            words(900, seed=3) + "Anna went to the garden. Tom took the green apple. ",
        ]
        asked = [
            ("The secret code of the rusty lantern is", {"remember": False}),
            ("The", {"do_sample": True, "seed": 5, "temperature": 1.5}),
        ]
        engines = [session.create(folder / f"{i}.mctx") for i in range(2)]
        for each, text in zip(engines, texts, strict=True):
            each.ingest(text)
        return [
            (each, prompt, {"max_new_tokens": 40, **options})
            for each, (prompt, options) in zip(engines, asked, strict=True)
        ]

    with Session(SessionConfig(model="bundled:tiny", engine=engine)) as session:
        check_against_alone(tmp_path, session.base, monkeypatch, sessions)


def test_frequencies_that_follow_the_sequences_length(tmp_path, monkeypatch):
    """A short and a long sequence, each with frequencies of its own, must not share a forward."""
    scaled = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 100,
    }
    own = {"head_dim": 8, "rope_parameters": scaled}
    monkeypatch.setitem(tiny_models.CONFIGS, "longrope", (LlamaConfig, own))

    def sessions(folder, base):
        short = told(folder, base, words(20), name="0")
        return [
            (short, "so? ", {"max_new_tokens": 12}),
            (told(folder, base, name="1"), "so? ", {"max_new_tokens": 12}),
        ]

    base = tiny_base_model("longrope", max_positions=256)
    check_against_alone(tmp_path, base, monkeypatch, sessions)


def test_one_forward_per_token(base, tmp_path, monkeypatch):
    shapes = []
    forward = BaseModel.forward_rows

    def watched(self, embeddings, *rest):
        shapes.append(tuple(embeddings.shape[:2]))
        return forward(self, embeddings, *rest)

    engines = [told(tmp_path, base, name=f"{i}") for i in range(3)]
    monkeypatch.setattr(BaseModel, "forward_rows", watched)
    with SessionBatch(base) as batch:
        for engine, count in zip(engines, (10, 10, 6), strict=True):
            add(batch, engine, max_new_tokens=count, remember=False)
        heard(batch)
    assert [rows > 1 for _, rows in shapes[:3]] == [True] * 3, "windows are read one by one"
    assert shapes[3:] == [(3, 1)] * 5 + [(2, 1)] * 4


def test_sessions_join_and_leave(base, tmp_path):
    engines = [told(tmp_path, base, words(300 + 90 * i), name=f"{i}") for i in range(3)]
    expected = [text_of(alone(e, max_new_tokens=40, remember=False)) for e in engines]
    answers = {}
    with SessionBatch(base) as batch:
        assert batch.step() == []
        for number, engine in enumerate(engines):
            assert add(batch, engine, max_new_tokens=40, remember=False) == number
            for _ in range(7 * number):
                for index, token in batch.step():
                    answers.setdefault(index, []).append(token)
        assert batch.sessions == (0, 1, 2)
        batch.stop(1)
        assert batch.sessions == (0, 2)
        with pytest.raises(InputError, match="session 1 of the batch is not decoding"):
            batch.stop(1)
        heard(batch, answers)
        assert batch.sessions == ()
        # The engine is free again, and what it said is not remembered.
        assert add(batch, engines[1], max_new_tokens=40, remember=False) == 3
        heard(batch, answers)
    stopped = text_of(answers.pop(1))
    assert stopped == expected[1][: len(stopped)]
    assert 10 <= len(stopped) < 40
    assert [text_of(answers[i]) for i in (0, 3, 2)] == expected


def test_what_was_heard_is_remembered(base, tmp_path):
    engines = [told(tmp_path, base, name=f"{i}") for i in range(2)]
    answers = {0: [], 1: []}
    with SessionBatch(base) as batch:
        for engine in engines:
            add(batch, engine)
        for index, token in batch:
            answers[index].append(token.id)
            if len(answers[1]) == 5:
                break
    prompt = base.encode("so? ").tolist()
    for index, engine in enumerate(engines):
        assert engine.memory.tokens(len(TOLD)).tolist() == prompt + answers[index]
        assert engine.context.cursor == engine.memory.n_tokens


def test_a_session_that_cannot_go_on_leaves_the_others(base, tmp_path):
    engines = [told(tmp_path, base, name=f"{i}") for i in range(3)]
    expected = [text_of(alone(e, max_new_tokens=6, remember=False)) for e in engines]
    with SessionBatch(base) as batch:
        for engine, prompt in zip(engines, ("so? ", words(100), "so? "), strict=True):
            add(batch, engine, prompt, max_new_tokens=6, remember=False)
        with pytest.raises(InputError, match="do not fit beside"):
            batch.step()
        assert batch.sessions == (0, 2)
        answers = heard(batch)
    assert [text_of(answers.pop(i)) for i in (0, 2)] == [expected[0], expected[2]]
    assert not answers
    assert engines[1].context.cursor == engines[1].memory.n_tokens


def test_tokens_beside_a_failure_are_given_out_with_the_next_step(base, tmp_path, monkeypatch):
    engines = [told(tmp_path, base, name=f"{i}") for i in range(3)]
    expected = [text_of(alone(e, max_new_tokens=6, remember=False)) for e in engines]
    choose = TokenSampler.choose

    def failing(self, logits, context_ids):
        sick = self.config.repetition_penalty == 1.5 and len(context_ids) == 4 + 2
        return choose(self, logits * torch.nan if sick else logits, context_ids)

    monkeypatch.setattr(TokenSampler, "choose", failing)
    answers = {}
    with SessionBatch(base) as batch:
        for engine, penalty in zip(engines, (1.3, 1.5, 1.3), strict=True):
            options = {"repetition_penalty": penalty, "max_new_tokens": 6, "remember": False}
            add(batch, engine, **options)
        with pytest.raises(ModelError, match="not finite"):
            heard(batch, answers)
        heard(batch, answers)
    assert [text_of(answers[i]) for i in (0, 2)] == [expected[0], expected[2]]
    assert len(answers.get(1, [])) <= 2


def test_each_session_tells_of_itself(base, tmp_path):
    sinks = [MemorySink() for _ in range(2)]
    engines = [
        told(tmp_path, base, name=f"{i}", telemetry=Telemetry(sink)) for i, sink in enumerate(sinks)
    ]
    with SessionBatch(base) as batch:
        for engine, count in zip(engines, (5, 40), strict=True):
            add(batch, engine, max_new_tokens=count)
        answers = heard(batch)
    for index, (engine, sink) in enumerate(zip(engines, sinks, strict=True)):
        (event,) = [event for event in sink.events if event.kind == "decode"]
        assert (event.start, event.tokens) == (len(TOLD) + 4, len(answers[index]))
        for token in answers[index]:
            explained = engine.explain(token.index)
            assert explained.token == token
            assert explained.record.round == token.round


def test_what_cannot_be_added(base, tmp_path):
    engine = told(tmp_path, base)
    twin = Engine(base, engine.memory, config=config())
    with SessionBatch(base) as batch:
        add(batch, engine)
        for other in (engine, twin):
            with pytest.raises(InputError, match=r"a\.mctx: session 0 of the batch uses it"):
                add(batch, other, remember=False)
        with pytest.raises(InputError, match="load the model once"):
            add(batch, told(tmp_path, tiny_base_model(max_positions=256), name="b"))
        with pytest.raises(InputError, match="max_new_tokens"):
            add(batch, told(tmp_path, base, name="c"), max_new_tokens=0)
        assert batch.sessions == (0,)


def test_readers_of_one_memory(base, tmp_path):
    told(tmp_path, base).memory.close()
    memory = Memory.open(tmp_path / "a.mctx")
    engines = [Engine(base, memory, config=config()) for _ in range(2)]
    expected = text_of(alone(engines[0], max_new_tokens=5, remember=False))
    with SessionBatch(base) as batch:
        for engine in engines:
            add(batch, engine, max_new_tokens=5, remember=False)
        answers = heard(batch)
    assert [text_of(answers[i]) for i in (0, 1)] == [expected, expected]


def test_the_example():
    results = doctest.testmod(session_batch)
    assert results.attempted > 5
    assert results.failed == 0
