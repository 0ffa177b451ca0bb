import dataclasses

import pytest
import torch

from megacontext.errors import CheckpointError, InputError
from megacontext.gistnet import GistNet
from megacontext.lensnet import (
    FEATURE_NAMES,
    N_FEATURES,
    CacheFeatures,
    EntryFeatures,
    LensNet,
    LensNetConfig,
    TailStates,
)

D = 16
SMALL = {"d_model": D, "gist_width": 2 * D, "d_hidden": 16, "n_heads": 2, "d_ff": 8}


def trained(**values):
    net = LensNet(LensNetConfig(**(SMALL | {"key_width": 8} | values))).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def batch(b=2, n=5, m=7, t=6, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def always(count):
        return torch.ones(b, count, dtype=torch.bool)

    entries = EntryFeatures(
        draw(b, n, 2 * D), draw(b, n, N_FEATURES), always(n), always(n), always(n)
    )
    cache = CacheFeatures(draw(b, m, 2 * D), draw(b, m, N_FEATURES), always(m))
    return entries, cache, TailStates(draw(b, t, D), always(t))


@torch.no_grad()
def test_shapes_and_dependence_on_every_input():
    net = trained()
    entries, cache, tail = batch()
    scores = net(entries, cache, tail)
    assert scores.entry.shape == (2, 5)
    assert scores.cache.shape == (2, 7)
    other_entries, other_cache, other_tail = batch(seed=1)
    for changed in (
        (other_entries, cache, tail),
        (entries, other_cache, tail),
        (entries, cache, other_tail),
    ):
        different = net(*changed)
        assert not torch.allclose(different.entry, scores.entry, atol=1e-4)
        assert not torch.allclose(different.cache, scores.cache, atol=1e-4)
    again = net(entries, cache, tail)
    assert torch.equal(again.entry, scores.entry)
    assert torch.equal(again.cache, scores.cache)


@torch.no_grad()
def test_scores_in_a_batch_do_not_mix():
    net = trained()
    entries, cache, tail = batch()
    scores = net(entries, cache, tail)
    single = [
        type(part)(**{name: value[1:] for name, value in vars(part).items()})
        for part in (entries, cache, tail)
    ]
    alone = net(*single)
    torch.testing.assert_close(alone.entry, scores.entry[1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(alone.cache, scores.cache[1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_illegal_directions_score_zero():
    net = trained()
    entries, cache, tail = batch(n=40)
    free = net(entries, cache, tail).entry
    assert (free > 0).any()
    assert (free < 0).any()
    never = torch.zeros_like(entries.mask)
    raw = net(dataclasses.replace(entries, can_expand=never), cache, tail).entry
    assert torch.equal(raw, free.where(free < 0, 0.0))
    root = net(dataclasses.replace(entries, can_collapse=never), cache, tail).entry
    assert torch.equal(root, free.where(free > 0, 0.0))
    both = dataclasses.replace(entries, can_expand=never, can_collapse=never)
    assert not net(both, cache, tail).entry.any()


@pytest.mark.parametrize(("n", "m", "t"), [(5, 0, 6), (0, 7, 6), (5, 7, 0), (0, 0, 0)])
@torch.no_grad()
def test_empty_parts(n, m, t):
    scores = trained()(*batch(n=n, m=m, t=t))
    assert scores.entry.shape == (2, n)
    assert scores.cache.shape == (2, m)
    assert scores.entry.isfinite().all()
    assert scores.cache.isfinite().all()


@torch.no_grad()
def test_untrained_lens_is_calm_or_lexical():
    entries, cache, tail = batch()
    scores = LensNet(LensNetConfig(**SMALL))(entries, cache, tail)
    assert not scores.entry.any()
    assert not scores.cache.any()
    scores = LensNet(LensNetConfig(**SMALL, lexical_prior=2.0))(entries, cache, tail)
    lexical = cache.features[..., FEATURE_NAMES.index("lexical_relative")]
    assert not scores.entry.any()
    torch.testing.assert_close(scores.cache, 2 * lexical)
    priors = {"lexical_prior": 2.0, "learned_prior": 3.0}
    scores = LensNet(LensNetConfig(**SMALL, **priors))(entries, cache, tail)
    learned = cache.features[..., FEATURE_NAMES.index("learned_relative")]
    torch.testing.assert_close(scores.cache, 2 * lexical + 3 * learned)


def test_every_scoring_parameter_trains():
    net = trained()
    scores = net(*batch())
    (scores.entry.pow(3).sum() + scores.cache.pow(3).sum()).backward()
    for name, parameter in net.named_parameters():
        if name.startswith(("key_encoder", "query_head")):
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def test_untrained_heads_can_start_to_learn():
    net = LensNet(LensNetConfig(**SMALL))
    entries, cache, tail = batch()
    scores = net(entries, cache, tail)
    ((scores.entry - 1).pow(2).sum() + (scores.cache - 1).pow(2).sum()).backward()
    assert net.entry_head.score.weight.grad.abs().sum() > 0
    assert net.cache_head.shortcut.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_checkpoint_round_trip_is_bit_identical(tmp_path):
    net = trained(key_vocabulary=50)
    net.save_pretrained(tmp_path)
    loaded = LensNet.from_pretrained(tmp_path)
    assert loaded.config == net.config
    assert loaded.version == net.version
    for name, value in net.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    scores, again = net(*batch()), loaded(*batch())
    assert torch.equal(scores.entry, again.entry)
    assert torch.equal(scores.cache, again.cache)


def test_another_networks_checkpoint_is_refused(tmp_path):
    GistNet.untrained(D).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="expected 'megacontext-lensnet'"):
        LensNet.from_pretrained(tmp_path)


def test_initial_weights_come_from_the_seed_alone():
    config = LensNetConfig(**SMALL, key_vocabulary=50)
    state = torch.get_rng_state()
    first = LensNet(config)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert LensNet(config).version == first.version


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        (0, "vectors", torch.zeros(2, 5, D), r"entries\.vectors.*expected floating \(2, 5, 32\)"),
        (0, "features", torch.zeros(2, 5, 3), r"entries\.features.*\(2, 5, 24\)"),
        (0, "can_expand", torch.zeros(2, 5), r"entries\.can_expand.*expected bool \(2, 5\)"),
        (1, "vectors", torch.zeros(3, 7, 2 * D), r"cache\.vectors.*\(2, 7, 32\)"),
        (1, "mask", torch.zeros(3, 7).bool(), r"cache\.mask.*\(2, 7\)"),
        (2, "hidden", torch.zeros(2, 6, D + 1), r"hidden states.*\(2, 6, 16\)"),
    ],
)
def test_bad_inputs_are_named(part, field, value, message):
    parts = list(batch())
    parts[part] = dataclasses.replace(parts[part], **{field: value})
    with pytest.raises(InputError, match=message):
        trained()(*parts)
