"""Features of tokens from the base's first layers, against the whole model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine_cases import K, contents, learned_gistnet, new_engine, words
from tiny_models import ARCHITECTURES, tiny_base_model
from torch import nn

from megacontext.errors import CheckpointError, ConfigError, InputError, ModelError
from megacontext.gistnet import GistNetConfig
from megacontext.runtime.engine import Engine
from megacontext.runtime.gist_features import GistFeatures, encode_blocks
from megacontext.runtime.regist import regist

SEGMENT = 48


def features(base, layers, segment=SEGMENT):
    return GistFeatures(base, config(base, layers, segment))


def config(base, layers, segment=SEGMENT):
    return GistNetConfig(
        d_model=base.d_model, block_size=2, feature_layers=layers, feature_segment=segment
    )


def tokens(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def deep_net(base, layers=1, segment=64, **options):
    return learned_gistnet(base, feature_layers=layers, feature_segment=segment, **options)


@torch.no_grad()
def states(base, ids, layer):
    """Hidden states of the whole model, every segment read by itself."""
    found = []
    for part in ids.split(SEGMENT, dim=-1):
        output = base.model.get_decoder()(part, output_hidden_states=True)
        every = [*output.hidden_states[:-1], output.last_hidden_state]
        found.append(every[layer])
    return torch.cat(found, dim=1)


@pytest.mark.portability
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2"])
def test_the_states_of_the_whole_model(architecture):
    base, ids = tiny_base_model(architecture), tokens(2, 3 * SEGMENT - 5)
    for layer in range(base.n_layers + 1):
        found = features(base, layer).of(ids)
        assert found.shape == (2, 3 * SEGMENT - 5, base.d_model)
        if layer:
            torch.testing.assert_close(found, states(base, ids, layer), atol=1e-5, rtol=1e-4)
        else:
            assert torch.equal(found, base.embed(ids))


def test_a_token_depends_on_its_segment_up_to_itself(base):
    of, ids = features(base, 2).of, tokens(3 * SEGMENT)
    at = SEGMENT + 10
    changed = ids.clone()
    changed[at] = (ids[at] + 1) % 256
    same = (of(ids) == of(changed)).all(dim=-1)
    assert same[:at].all()
    assert not same[at : 2 * SEGMENT].any()
    assert same[2 * SEGMENT :].all()


@pytest.mark.parametrize("segment", [2, 16, 48, 256])
def test_every_bit_is_the_same_whatever_else_is_computed(base, segment):
    made, ids = features(base, 2, segment), tokens(5000)
    whole = made.of(ids)
    for start, end in ((0, 1), (0, segment - 1), (segment, 2 * segment + 3), (0, 3 * segment)):
        assert torch.equal(made.of(ids[start:end]), whole[start:end])
    last = made.segment_start(4999)
    assert last == 4999 // segment * segment
    assert torch.equal(made.of(ids[last:]), whole[last:])
    batch = torch.stack((ids[:segment], ids[segment : 2 * segment]))
    assert torch.equal(made.of(batch).flatten(0, 1), whole[: 2 * segment])
    assert made.of(ids[:0]).shape == (0, base.d_model)


def test_only_the_first_layers_run_and_the_model_stays_as_it_was():
    base = tiny_base_model()
    modules = dict(base.model.named_modules())
    ran = []
    for index, layer in enumerate(base.model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    base.model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    features(base, 2).of(tokens(2 * SEGMENT))
    assert ran == [0, 1]
    ran.clear()
    base.features(tokens(5))
    assert ran == [0, 1, 2]
    assert {name: id(m) for name, m in base.model.named_modules()} == {
        name: id(m) for name, m in modules.items()
    }
    assert all(len(layer._forward_hooks) == 1 for layer in base.model.model.layers)


def test_threads_do_not_meet(base):
    made, ids = [features(base, layers) for layers in (1, 2)], tokens(2 * SEGMENT)
    whole, few = base.features(ids), [f.of(ids) for f in made]
    with ThreadPoolExecutor(3) as pool:
        runs = [
            (pool.submit(base.features, ids), pool.submit(made[0].of, ids),
             pool.submit(made[1].of, ids))
            for _ in range(15)
        ]  # fmt: skip
    for one, two, three in runs:
        assert torch.equal(one.result(), whole)
        assert torch.equal(two.result(), few[0])
        assert torch.equal(three.result(), few[1])


def test_features_are_inputs_of_training(base):
    net, ids = deep_net(base), tokens(4 * K)
    read = GistFeatures(base, net.config).of(ids)
    assert not read.requires_grad
    net.encode_level(read, 1).vectors.sum().backward()
    assert net.encoder.out.weight.grad.any()
    assert all(p.grad is None for p in base.model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize(("first", "last"), [(0, 3), (1, 2), (5, 9)])
def test_blocks_are_encoded_from_their_segments_start(base, layers, first, last):
    net, ids = deep_net(base, layers, 96), tokens(10 * K)
    read = []

    def history(start, end):
        read.append((start, end))
        return ids[start:end].int()

    made = GistFeatures(base, net.config)
    found = encode_blocks(made, net, history, first, last)
    children, reach = made.of(ids), net.config.context_tokens
    for index, block in enumerate(range(first, last)):
        start = block * K
        before = children[max(0, start - reach) : start][None] if start else None
        wanted = net.encode(children[start : start + K][None], 1, before)
        torch.testing.assert_close(found.vectors[index], wanted.vectors[0], atol=1e-5, rtol=1e-4)
    begin = max(0, first * K - reach)
    assert read == [(begin // 96 * 96 if layers else begin, last * K)]


def test_ingest_and_regist_give_the_same_memory(base, tmp_path):
    net, text = deep_net(base, slots=2), words(1300)
    whole = new_engine(tmp_path, base, name="whole", gistnet=net)
    whole.ingest(text)
    pieces = new_engine(tmp_path, base, name="pieces", gistnet=net)
    for start, end in ((0, 40), (40, 41), (41, 900), (900, 928), (928, 1300)):
        pieces.ingest(text[start:end])
    assert contents(pieces.memory) == contents(whole.memory)
    old = new_engine(tmp_path, base, name="old")
    old.ingest(text)
    assert contents(old.memory) != contents(whole.memory)
    regist(base, old.memory, net)
    assert contents(old.memory) == contents(whole.memory)
    options = {"max_new_tokens": 5, "eos_token_id": (), "remember": False}
    answers = [
        [token.id for token in engine.generate("so? ", **options)] for engine in (whole, pieces)
    ]
    assert answers[0] == answers[1]


def test_layers_and_segments_tell_gists_apart(base, tmp_path):
    held = []
    for name, layers, segment in (("a", 0, 64), ("b", 1, 64), ("c", 2, 64), ("d", 1, 96)):
        net = deep_net(base, layers, segment)
        engine = new_engine(tmp_path, base, name=name, gistnet=net)
        engine.ingest(words(400))
        held.append(str(contents(engine.memory)["gists 1"]))
    assert len(set(held)) == 4


def test_a_base_with_too_few_layers_or_positions_is_refused(base, tmp_path):
    with pytest.raises(ConfigError, match="feature_layers is 4, tiny-qwen3 has 3 layers; use a"):
        features(base, 4)
    with pytest.raises(ConfigError, match="feature_segment is 272, tiny-qwen3 has 256 positions"):
        features(base, 1, 272)
    features(base, 0, 272)
    deep = deep_net(base, 4)
    engine = new_engine(tmp_path, base)
    engine.ingest(words(100))
    before = contents(engine.memory)
    with pytest.raises(ConfigError, match="feature_layers is 4"):
        regist(base, engine.memory, deep)
    assert contents(engine.memory) == before
    with pytest.raises(CheckpointError, match=r"the GistNet's feature_layers is 4.*train one for"):
        Engine(base, engine.memory, gistnet=deep)


def test_layers_that_cannot_be_told_apart_are_refused():
    base = tiny_base_model()
    base.model.model.adapters = nn.ModuleList(nn.Linear(2, 2) for _ in range(base.n_layers))
    with pytest.raises(
        ModelError, match=r"cannot tell the layers of qwen3 apart.*feature_layers 0"
    ):
        features(base, 1)
    # All of them are the model as it is.
    assert features(base, 3).of(tokens(5)).shape == (5, base.d_model)


def test_ids_of_another_model_are_refused(base):
    with pytest.raises(InputError, match="token ids must lie in"):
        features(base, 1).of(torch.tensor([1, 9999]))
