from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_base_model
from torch.nn import functional as F

from megacontext.errors import ConfigError
from megacontext.gistnet import GistNet, GistNetConfig
from megacontext.runtime.gist_features import GistFeatures
from megacontext.runtime.history_buffers import HistoryBuffers
from megacontext.runtime.window_batch import window_states
from megacontext.runtime.window_layout import WindowLayout
from megacontext.training.gist_objective import GistBatch, GistObjective, ObjectiveConfig

K, BLOCKS = 4, 6
TOKENS = K * BLOCKS
ONE = [[0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]]
TWO = [[1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0]]
SPAN = [[2, 2, 2, 2, 0, 0], [2, 2, 2, 2, 0, 0]]
PLAIN = ObjectiveConfig(fidelity_weight=0.0)


@pytest.fixture(scope="module")
def base():
    return tiny_base_model()


def gistnet_for(base, **values):
    config = {
        "kind": "transformer", "d_model": base.d_model, "gist_width": 2 * base.d_model,
        "block_size": K, "context_tokens": 2 * K, "reader": "kv", "slots": 2, "max_levels": 3,
        "kv_layers": base.n_layers, "kv_heads": base.n_kv_heads, "kv_head_dim": base.head_dim,
        "kv_value_dim": base.value_dim,
    }  # fmt: skip
    net = GistNet(GistNetConfig(**(config | values)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def batch_of(levels, seed=0, weights=None, **values):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (len(levels), TOKENS), generator=generator)
    if weights is None:
        weights = torch.rand(len(levels), TOKENS, generator=generator)
    return GistBatch(ids, weights, torch.tensor(levels), **values)


def states_of(base, net, batch):
    deepest = int(batch.levels.max())
    features = GistFeatures(base, net.config).of(batch.ids)
    buffers = HistoryBuffers.encode(net, base.embed(batch.ids), levels=deepest, features=features)
    layout = WindowLayout.of(batch.levels, block_size=K, slots=batch.slots or net.cost)
    return window_states(base, net, buffers, layout), buffers, layout


@torch.no_grad()
def divergences(base, net, batch):
    """``(window, token, seen) -> KL`` at every raw row that predicts a token of its window."""
    states, _, layout = states_of(base, net, batch)
    found = {}
    for window, ids in enumerate(batch.ids):
        teacher = F.log_softmax(base.model.lm_head(base.features(ids)), -1)
        student = F.log_softmax(base.model.lm_head(states[window]), -1)
        for row, token in enumerate(layout.tokens[window].tolist()):
            if token + 1 < TOKENS:
                kl = (teacher[token].exp() * (teacher[token] - student[row])).sum()
                found[window, token, int(layout.seen[window, row])] = float(kl)
    return found


@pytest.mark.parametrize("levels", [ONE, TWO, SPAN], ids=["one", "two", "span"])
@pytest.mark.parametrize("reader", ["kv", "embedding"])
@pytest.mark.parametrize("slots", [None, 1])
def test_the_loss_is_the_weighted_kl_behind_the_gists(base, levels, reader, slots):
    net = gistnet_for(base, reader=reader)
    batch = batch_of(levels, slots=slots)
    with torch.no_grad():
        terms = GistObjective(base, net, PLAIN)(batch)
    assert set(terms) == {"loss", "kl"}
    total = weight = 0.0
    for (window, token, seen), kl in divergences(base, net, batch).items():
        if seen:
            least = max(float(batch.weights[window, token + 1]), PLAIN.least_weight)
            total, weight = total + least * kl, weight + least
    assert total / weight > 0.01
    assert float(terms["kl"]) == pytest.approx(total / weight, rel=1e-3)
    assert float(terms["loss"]) == float(terms["kl"])


@torch.no_grad()
@pytest.mark.parametrize("segment", [2 * K, 128])
def test_gists_of_the_bases_first_layers(base, segment):
    net = gistnet_for(base, feature_layers=2, feature_segment=segment)
    batch = batch_of(TWO, weights=torch.ones(2, TOKENS))
    found = float(GistObjective(base, net, PLAIN)(batch)["kl"])
    known = [kl for (_, _, seen), kl in divergences(base, net, batch).items() if seen]
    assert found == pytest.approx(sum(known) / len(known), rel=1e-3)
    of_embeddings = float(GistObjective(base, gistnet_for(base), PLAIN)(batch)["kl"])
    assert found != pytest.approx(of_embeddings, rel=1e-2)


@torch.no_grad()
def test_what_reads_as_the_raw_text_costs_nothing(base):
    net, batch = gistnet_for(base), batch_of(TWO)
    states, _, layout = states_of(base, net, batch)
    teacher = torch.zeros(2, TOKENS, base.d_model)
    teacher.scatter_(1, layout.tokens[..., None].expand_as(states), states)
    same = replace(batch, teacher=teacher)
    assert float(GistObjective(base, net, PLAIN)(same)["kl"]) == pytest.approx(0, abs=1e-5)


@torch.no_grad()
def test_states_are_compared_in_units_of_the_teachers(base):
    net = gistnet_for(base)
    batch = batch_of(TWO)
    terms = GistObjective(base, net, ObjectiveConfig(state_weight=0.5, fidelity_weight=0))(batch)
    states, _, layout = states_of(base, net, batch)
    found = []
    for window, ids in enumerate(batch.ids):
        teacher = base.features(ids)
        for row, token in enumerate(layout.tokens[window].tolist()):
            if token + 1 < TOKENS and layout.seen[window, row]:
                apart = states[window, row] - teacher[token]
                found.append(float(apart.square().sum() / teacher[token].square().sum()))
    assert set(terms) == {"loss", "kl", "states"}
    assert float(terms["states"]) == pytest.approx(sum(found) / len(found), rel=1e-3)
    torch.testing.assert_close(terms["loss"], terms["kl"] + 0.5 * terms["states"])


@torch.no_grad()
def test_a_teacher_at_hand_is_the_one_that_is_computed(base):
    net, batch = gistnet_for(base), batch_of(ONE)
    teacher = torch.stack([base.features(ids) for ids in batch.ids])
    given = replace(batch, teacher=teacher)
    objective = GistObjective(base, net, ObjectiveConfig(contrast_weight=1.0))
    computed, found = objective(batch), objective(given)
    assert computed.keys() == found.keys()
    for name, value in computed.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tokens_that_no_gist_precedes_do_not_count(base):
    net = gistnet_for(base)
    objective = GistObjective(base, net, PLAIN)
    levels = [[0, 0, 1, 0, 0, 0]]
    batch = batch_of(levels)
    first = 3 * K + 1  # predicted by the first row behind the gist
    kl = float(objective(batch)["kl"])
    for changed, counts in ((slice(0, first), False), (slice(first, first + 1), True)):
        weights = batch.weights.clone()
        weights[:, changed] = 50.0
        found = float(objective(batch_of(levels, weights=weights))["kl"])
        assert (found == pytest.approx(kl, rel=1e-6)) is not counts


@torch.no_grad()
def test_weights_choose_tokens(base):
    net = gistnet_for(base)
    known = divergences(base, net, batch_of(ONE))
    objective = GistObjective(base, net, ObjectiveConfig(fidelity_weight=0.0, least_weight=0.0))
    for window, token in ((0, 9), (1, 17), (1, 22)):
        weights = torch.zeros(2, TOKENS)
        weights[window, token + 1] = 3.0
        kl = float(objective(batch_of(ONE, weights=weights))["kl"])
        assert kl == pytest.approx(known[window, token, 1], rel=1e-3)
    nothing = objective(batch_of(ONE, weights=torch.zeros(2, TOKENS)))
    assert float(nothing["kl"]) == 0.0


@torch.no_grad()
@pytest.mark.parametrize("horizon", [3, 64])
@pytest.mark.parametrize("least", [0.2, 0.0])
def test_fidelity_is_measured_behind_a_single_gist(base, horizon, least):
    net = gistnet_for(base)
    config = ObjectiveConfig(fidelity_weight=0.3, fidelity_horizon=horizon, least_weight=least)
    # Without a least weight, rows that count nothing are left out.
    weights = (torch.arange(TOKENS) % 3 > 0).float().expand(2, -1)
    batch = batch_of(ONE, weights=weights)
    terms = GistObjective(base, net, config)(batch)
    assert set(terms) == {"loss", "kl", "fidelity"}
    _, buffers, layout = states_of(base, net, batch)
    known = divergences(base, net, batch)
    error = 0.0
    for window in range(2):
        end = (int(layout.gists[window, 0]) + 1) * K
        near = [
            known[window, token, 1]
            for token in range(end, min(end + horizon, TOKENS - 1))
            if least or weights[window, token + 1]
        ]
        measured = torch.tensor(sum(near) / len(near) + 1e-4).log()
        predicted = (buffers.fidelity[window, layout.gists[window, 0]] + 1e-4).log()
        error += float((predicted - measured) ** 2) / 2
    assert float(terms["fidelity"]) == pytest.approx(error, rel=1e-3)
    assert float(terms["loss"]) == pytest.approx(float(terms["kl"]) + 0.3 * error, rel=1e-3)


def test_fidelity_is_only_learned_where_one_gist_is_to_blame(base):
    net = gistnet_for(base)
    objective = GistObjective(base, net, ObjectiveConfig(fidelity_weight=1.0))
    assert "fidelity" not in objective(batch_of(TWO))
    objective(batch_of(ONE))["fidelity"].backward()
    learned = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"encoder.fidelity.weight", "encoder.fidelity.bias"} <= learned
    # The true cost is a measurement: it does not pull at the reader.
    assert not any(name.startswith("reader.") for name in learned)


def test_reconstruction_names_the_tokens_of_every_block(base):
    net, batch = gistnet_for(base), batch_of(TWO)
    objective = GistObjective(
        base, net, ObjectiveConfig(reconstruction_weight=0.5, fidelity_weight=0)
    )
    terms = objective(batch)
    assert set(terms) == {"loss", "kl", "reconstruction"}
    _, buffers, _ = states_of(base, net, batch)
    table = base.embed(torch.arange(base.vocab_size))
    with torch.no_grad():
        total = 0.0
        for window, ids in enumerate(batch.ids):
            for block in range(BLOCKS):
                read = objective.bag(buffers.gists[window, block])
                read = read / read.square().mean().add(torch.finfo().eps).sqrt()
                likelihood = F.log_softmax(table @ read, dim=0)
                total -= float(likelihood[ids[block * K : (block + 1) * K]].sum())
    assert float(terms["reconstruction"].detach()) == pytest.approx(total / (2 * TOKENS), rel=1e-3)
    expected = terms["kl"] + 0.5 * terms["reconstruction"]
    torch.testing.assert_close(terms["loss"], expected)
    terms["reconstruction"].backward()
    assert objective.bag.weight.grad.any()
    assert net.encoder.out.weight.grad.any()


def test_contrast_tells_blocks_apart(base):
    net, batch = gistnet_for(base), batch_of(SPAN)
    objective = GistObjective(base, net, ObjectiveConfig(contrast_weight=2.0, fidelity_weight=0))
    terms = objective(batch)
    assert set(terms) == {"loss", "kl", "contrast"}
    _, buffers, _ = states_of(base, net, batch)
    with torch.no_grad():
        gists = objective.match(buffers.gists[:, :BLOCKS].reshape(2 * BLOCKS, -1))
        means = torch.cat([base.features(ids).reshape(BLOCKS, K, -1).mean(1) for ids in batch.ids])
        likeness = torch.cosine_similarity(gists[:, None], means[None], dim=-1) / 0.07
        wanted = (likeness.logsumexp(1) - likeness.diagonal()).mean()
    assert float(terms["contrast"].detach()) == pytest.approx(float(wanted), rel=1e-3)
    torch.testing.assert_close(terms["loss"], terms["kl"] + 2 * terms["contrast"])
    terms["contrast"].backward()
    assert objective.match.weight.grad.any()
    assert net.encoder.out.weight.grad.any()


def test_the_base_is_neither_trained_nor_saved(base):
    net = gistnet_for(base)
    config = ObjectiveConfig(contrast_weight=1.0, reconstruction_weight=1.0)
    objective = GistObjective(base, net, config)
    own = {name for name in objective.state_dict() if not name.startswith("gistnet.")}
    assert own == {"bag.weight", "match.weight"}
    objective(batch_of(SPAN))["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in objective.parameters())
    assert all(parameter.grad is None for parameter in base.model.parameters())


def test_extra_weights_follow_from_the_seed(base):
    config = ObjectiveConfig(contrast_weight=1.0, reconstruction_weight=1.0)
    drawn = []
    for seed in (0, 0, 1):
        torch.rand(3)
        drawn.append(GistObjective(base, gistnet_for(base, init_seed=seed), config).bag.weight)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_training_lowers_the_loss(base):
    net = gistnet_for(base)
    objective = GistObjective(base, net, ObjectiveConfig())
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    batch = batch_of(ONE)
    losses = []
    for _ in range(15):
        terms = objective(batch)
        losses.append(float(terms["kl"].detach()))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_a_batch_moves_as_a_whole():
    batch = batch_of(ONE, slots=1, teacher=torch.zeros(2, TOKENS, 3)).to(torch.device("meta"))
    assert batch.slots == 1
    moved = (batch.ids, batch.weights, batch.levels, batch.teacher)
    assert all(tensor.device.type == "meta" for tensor in moved)
    assert batch_of(ONE).to(torch.device("cpu")).teacher is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fidelity_weight": -1}, "'fidelity_weight' has value -1"),
        ({"fidelity_horizon": 0}, "'fidelity_horizon' has value 0"),
        ({"reconstruction_weight": float("inf")}, "'reconstruction_weight' has value inf"),
        ({"contrast_weight": -0.5}, "'contrast_weight' has value -0.5"),
        ({"least_weight": float("nan")}, "'least_weight' has value nan"),
        ({"temperature": 1.0}, "unknown key 'temperature'"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig.parse(values)
