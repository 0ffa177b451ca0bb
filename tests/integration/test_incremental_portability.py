"""KV ``incremental`` on every supported architecture."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, config, learned_gistnet, new_engine, words
from incremental_cases import SlowReading, held
from tiny_models import ARCHITECTURES, tiny_base_model, tiny_model

from megacontext.errors import ConfigError
from megacontext.runtime.focus_scores import FocusScores
from megacontext.runtime.reading import ExactReading, IncrementalReading

pytestmark = pytest.mark.portability

TOLERANCE = 1e-3
NOTHING = torch.empty(0, dtype=torch.int64)
SETTINGS = {"budget": 192, "kv": "incremental"}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request):
    return request.param


def new(architecture, folder, *, reader="kv", name="a", **changes):
    base = tiny_base_model(architecture, max_positions=256)
    net = learned_gistnet(base, reader=reader, slots=2 if reader == "kv" else 1)
    own = config(**(SETTINGS | changes))
    return new_engine(folder, base, gistnet=net, config=own, name=name)


def edit(engine):
    """Two blocks become raw, one of them deep in a coarse gist, and one that was raw a gist."""
    context = engine.context
    raw = (context.levels == 0) & context.legal_collapse
    if bool(raw.any()):
        context = context.collapse(int(raw.nonzero()[0]))
    deep = int((context.levels > 1).nonzero()[0])
    context = context.reveal(int(context.starts[deep]) // K + 3)
    engine.focus.context = context.reveal(K + 2)


@pytest.mark.parametrize("remember", [True, False])
def test_without_edits_the_answer_is_the_plain_models(architecture, remember, tmp_path):
    engine = new(architecture, tmp_path, budget=256)
    engine.ingest(words(50))
    prompt = engine.base.encode("who? ")
    ids = torch.cat((engine.memory.tokens().long(), prompt))
    with torch.no_grad():
        expected = tiny_model(architecture, max_positions=256).generate(
            ids[None], max_new_tokens=40, do_sample=False, eos_token_id=None
        )
    answer = list(engine.generate("who? ", max_new_tokens=40, remember=remember, eos_token_id=()))
    assert [token.id for token in answer] == expected[0, len(ids) :].tolist()
    assert len({token.round for token in answer}) == 2


@pytest.mark.parametrize("reader", ["kv", "embedding"])
def test_an_edited_window_holds_what_the_slow_reference_holds(architecture, reader, tmp_path):
    # Room for both edits, which the allocator would have paid for.
    engine = new(architecture, tmp_path, reader=reader, budget=250, tail_tokens=8)
    engine.ingest(words(K * K + 5 * K + 7))
    engine.focus.context = engine.context.reveal(K + 4)
    base, prompt = engine.base, engine.base.encode("so?")
    reading, slow = IncrementalReading(base, engine.reader), SlowReading(engine)
    for each in (reading, slow):
        each.read(engine.context, prompt)
    for token in base.encode("ab").split(1):
        assert (reading.step(token) - slow.step(token)).abs().max() < TOLERANCE
    edit(engine)
    prompt = base.encode("so?ab")
    logits, expected = (each.read(engine.context, prompt) for each in (reading, slow))
    assert reading.computed == slow.computed < reading.cache.n_rows
    layout = engine.reader.layout(engine.context, len(prompt), ahead=K)
    found = held(reading, layout, engine.reader)
    assert found.keys() == slow.known.keys()
    for name, (position, keys, values) in found.items():
        assert position == slow.places[name]
        assert (keys - slow.known[name][0]).abs().max() < TOLERANCE
        assert (values - slow.known[name][1]).abs().max() < TOLERANCE
    assert (logits - expected).abs().max() < TOLERANCE


def test_first_layer_keys_are_those_of_a_fresh_reading(architecture, tmp_path):
    """In the first layer a key depends on its token and position alone: no reference rotates."""
    engine = new(architecture, tmp_path, budget=250, tail_tokens=8)
    engine.ingest(words(K * K + 5 * K + 7))
    engine.focus.context = engine.context.reveal(K + 4)
    reading = IncrementalReading(engine.base, engine.reader)
    reading.read(engine.context, NOTHING)
    edit(engine)
    reading.read(engine.context, NOTHING)
    exact = ExactReading(engine.base, engine.reader)
    exact.read(engine.context, NOTHING)
    order = reading.cache.positions.argsort()
    assert torch.equal(reading.cache.positions[order], exact.cache.positions)
    assert torch.equal(reading.cache.gist_positions, exact.cache.gist_positions)
    n_gists = exact.cache.n_gists
    order = torch.cat((torch.arange(n_gists), order + n_gists))
    mine, theirs = reading.cache.entries.layers[0], exact.cache.entries.layers[0]
    assert (mine.keys[:, :, order] - theirs.keys).abs().max() < 1e-4
    assert (mine.values[:, :, order] - theirs.values).abs().max() < 1e-4


class Wandering:
    """Wants another block at every look."""

    name = "wandering"

    def __init__(self):
        self.looks = 0

    def score(self, view):
        self.looks += 1
        n = len(view.context)
        block = torch.tensor([self.looks * 7 % 40])
        nothing = torch.zeros(n)
        return FocusScores(block, torch.tensor([5.0]), nothing, nothing)


@pytest.mark.parametrize("reader", ["kv", "embedding"])
def test_answers_over_an_edited_window_are_deterministic(architecture, reader, tmp_path):
    answers, rounds = [], set()
    for name in "ab":
        engine = new(architecture, tmp_path, reader=reader, name=name, refocus_rounds=1)
        engine.focus.policy = Wandering()
        engine.ingest(words(1340))
        said = list(engine.generate("so? ", max_new_tokens=66, eos_token_id=()))
        answers.append([token.id for token in said])
        rounds = {record.round for record in engine.focus.records if record.edits}
    assert answers[0] == answers[1]
    assert len(answers[0]) == 66
    assert len(rounds) == 3, "every look edits"


def test_keys_that_cannot_move_are_refused(tmp_path):
    base = tiny_base_model("gpt2", max_positions=256)
    with pytest.raises(ConfigError, match="set kv to 'exact'"):
        new_engine(tmp_path, base, config=config(kv="incremental"))
