"""The engine on every supported architecture, against the plain model."""

from __future__ import annotations

import pytest
import torch
from engine_cases import config, new_engine, words
from tiny_models import ARCHITECTURES, tiny_base_model, tiny_model

pytestmark = pytest.mark.portability

TOLERANCE = 1e-4
NOTHING = torch.empty(0, dtype=torch.int64)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def new(architecture, folder, **options):
    base = tiny_base_model(architecture, max_positions=256)
    return new_engine(folder, base, config=config(budget=256), **options)


def plain_logits(architecture, ids):
    model = tiny_model(architecture, max_positions=256)
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0]


def read_logits(engine, pending=NOTHING):
    return engine.base.prefill(engine.reader.read(engine.context, pending)).logits


def test_an_all_raw_window_gives_the_plain_models_logits(architecture, tmp_path):
    engine = new(architecture, tmp_path)
    engine.ingest(words(75))
    assert engine.state().entries == {0: 3}
    prompt = engine.base.encode("who?")
    ids = torch.cat((engine.memory.tokens().long(), prompt))
    expected = plain_logits(architecture, ids)
    assert expected.std() > 0.1, "logits too flat to show a mistake"
    assert (read_logits(engine, prompt) - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("remember", [True, False])
def test_greedy_answers_equal_the_plain_models(architecture, remember, tmp_path):
    engine = new(architecture, tmp_path)
    engine.ingest(words(50))
    prompt = engine.base.encode("who? ")
    ids = torch.cat((engine.memory.tokens().long(), prompt))
    model = tiny_model(architecture, max_positions=256)
    with torch.no_grad():
        expected = model.generate(ids[None], max_new_tokens=75, do_sample=False, eos_token_id=None)
    # 75 tokens: read at the start, refocused after 32 and 64, one by one in between.
    answer = list(engine.generate("who? ", max_new_tokens=75, remember=remember, eos_token_id=()))
    assert [token.id for token in answer] == expected[0, len(ids) :].tolist()
    assert len({token.round for token in answer}) == 3
    if remember:
        assert engine.memory.tokens().tolist() == expected[0].tolist()
        logits = plain_logits(architecture, expected[0])
        assert (read_logits(engine) - logits).abs().max() < TOLERANCE
        engine.refocus()
        assert (read_logits(engine) - logits).abs().max() < TOLERANCE


def test_an_edited_window_is_read_like_a_fresh_one(architecture, tmp_path):
    """Exact KV: resuming after expands and collapses gives the logits of a whole new reading."""
    engine = new(architecture, tmp_path)
    engine.ingest(words(700) + "the zebra sleeps in the blue barn. " + words(900))
    base, seen = engine.base, engine.context
    old = engine.reader.read(seen, NOTHING)
    cache = base.prefill(old).cache
    engine.refocus("where does the zebra sleep")
    assert engine.context.keys.tolist() != seen.keys.tolist(), "the refocus must edit"
    new_reading = engine.reader.read(engine.context, NOTHING)
    resumed = base.resume(cache, old, new_reading)
    logits = base.prefill(new_reading, resumed, keep=1).logits
    assert (logits - base.prefill(new_reading, keep=1).logits).abs().max() < TOLERANCE


def test_the_model_is_left_as_it_was(architecture, tmp_path):
    engine = new(architecture, tmp_path)
    plain = tiny_model(architecture, max_positions=256)
    for _ in engine.stream(words(600)):
        pass
    list(engine.generate("where? ", max_new_tokens=40))
    for module in engine.base.model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    for name, parameter in engine.base.model.named_parameters():
        assert torch.equal(parameter, plain.get_parameter(name)), name
