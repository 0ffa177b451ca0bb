"""The loss of the scores, term by term against plain loops."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megacontext.errors import ConfigError
from megacontext.lensnet import FEATURE_NAMES, N_FEATURES, LensNet, LensNetConfig, Snapshot, collate
from megacontext.training.lens_scores import (
    ScoreLossConfig,
    calibration,
    rank_correlation,
    score_loss,
    strange_keys,
)

D, WIDTH = 8, 16
TERMS = ("loss", "regression", "ranking", "evidence", "balance", "legality")


def draw_snapshot(seed, n=4, m=3, measured=0.7):
    """Random facts; utilities of about 3 nats, some of them not measured."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def utility(count):
        missing = torch.rand(count, generator=generator) > measured
        return (3 * draw(count)).masked_fill(missing, torch.nan)

    return Snapshot(
        entry_levels=torch.arange(n) % 3,
        entry_starts=torch.arange(n) * 32,
        entry_vectors=draw(n, WIDTH),
        entry_features=draw(n, N_FEATURES),
        entry_can_expand=draw(n) > 0,
        entry_can_collapse=draw(n) > 0,
        entry_utility=utility(n),
        cache_levels=torch.zeros(m, dtype=torch.int64),
        cache_starts=torch.arange(m) * 64,
        cache_vectors=draw(m, WIDTH),
        cache_features=draw(m, N_FEATURES),
        cache_utility=utility(m),
        cache_evidence=torch.tensor([1.0, 0.0, torch.nan])[
            torch.randint(3, (m,), generator=generator)
        ],
        tail_hidden=draw(5, D),
        cursor=torch.tensor(1000),
        tail_start=torch.tensor(900),
    )


def make_lens(seed=0, noise=0.4):
    lens = LensNet(
        LensNetConfig(
            d_model=D, gist_width=WIDTH, key_width=8, d_hidden=16, n_heads=2, d_ff=8, n_layers=1
        )
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in lens.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return lens


def huber(error, delta):
    return error**2 / 2 if abs(error) <= delta else delta * (abs(error) - delta / 2)


def mean(values):
    return sum(values) / max(1, len(values))


def terms_by_hand(lens, snapshots, config):
    """Every snapshot by itself, so that padding plays no part."""
    entry_errors, cache_errors, pairs, balances, illegal, told = [], [], [], [], [], []
    for snapshot in snapshots:
        alone = collate([snapshot])
        free = lens.unmasked(alone.entries, alone.cache, alone.tail)
        entry, cache = free.entry[0].tolist(), free.cache[0].tolist()
        for index, score in enumerate(entry):
            up = bool(snapshot.entry_can_expand[index])
            down = bool(snapshot.entry_can_collapse[index])
            allowed = up if score > 0 else down
            illegal.append(0.0 if allowed else score**2)
            truth = float(snapshot.entry_utility[index])
            if not math.isnan(truth):
                entry_errors.append(huber((score if allowed else 0.0) - truth, config.huber))
        truths = snapshot.cache_utility.tolist()
        known = [(s, t) for s, t in zip(cache, truths, strict=True) if not math.isnan(t)]
        cache_errors += [huber(score - truth, config.huber) for score, truth in known]
        pairs += [
            math.log1p(math.exp(worse - better))
            for better, more in known
            for worse, less in known
            if more > less + 0.1
        ]
        marks = snapshot.cache_evidence.tolist()
        others = [math.exp(s) for s, mark in zip(cache, marks, strict=True) if mark == 0]
        told += [
            -math.log(math.exp(s) / (math.exp(s) + sum(others)))
            for s, mark in zip(cache, marks, strict=True)
            if mark == 1 and others
        ]
        asked = sum(max(0.0, score) for score, _ in known)
        wanted = sum(max(0.0, truth) for _, truth in known)
        balances.append(huber(math.log1p(asked) - math.log1p(wanted), 1.0))
    regression = mean(entry_errors) + mean(cache_errors)
    terms = {
        "regression": regression,
        "ranking": mean(pairs),
        "evidence": mean(told),
        "balance": mean(balances),
        "legality": mean(illegal),
    }
    weights = (
        config.ranking_weight,
        config.evidence_weight,
        config.balance_weight,
        config.legality_weight,
    )
    return terms | {"loss": regression + sum(
        weight * terms[name] for weight, name in zip(weights, TERMS[2:], strict=True)
    )}  # fmt: skip


sizes = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4)


@torch.no_grad()
@given(sizes, st.integers(0, 1000), st.sampled_from([0.0, 0.6, 1.0]), st.floats(0.1, 5))
def test_every_term_by_hand(counts, seed, measured, delta):
    snapshots = [draw_snapshot(seed + i, n, m, measured) for i, (n, m) in enumerate(counts)]
    lens = make_lens(seed)
    config = ScoreLossConfig(
        ranking_weight=0.7,
        evidence_weight=0.4,
        balance_weight=0.2,
        legality_weight=0.3,
        huber=delta,
    )
    found = vars(score_loss(lens, collate(snapshots), config))
    assert tuple(found) == TERMS
    for name, value in terms_by_hand(lens, snapshots, config).items():
        assert float(found[name]) == pytest.approx(value, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize(
    "switched_off", ["ranking_weight", "evidence_weight", "balance_weight", "legality_weight"]
)
def test_a_weight_of_zero_leaves_a_term_out(switched_off):
    """Each term has its ablation: it is still reported, and pulls at nothing."""
    lens, batch = make_lens(), collate([draw_snapshot(i) for i in range(4)])
    whole = ScoreLossConfig(
        ranking_weight=1, evidence_weight=1, balance_weight=1, legality_weight=1
    )
    without = whole.model_copy(update={switched_off: 0.0})
    with torch.no_grad():
        terms, ablated = (vars(score_loss(lens, batch, c)) for c in (whole, without))
    name = switched_off.removesuffix("_weight")
    assert float(terms[name]) > 0.01
    assert float(ablated[name]) == float(terms[name])
    rest = float(terms["loss"]) - float(terms[name])
    assert float(ablated["loss"]) == pytest.approx(rest, rel=1e-5)


def test_illegal_moves_are_penalised_before_the_mask():
    """The mask makes such a score 0, and so hides it from the regression."""
    lens = make_lens()
    snapshot = draw_snapshot(3, n=6)
    neither = torch.zeros(6, dtype=torch.bool)
    stuck = dataclasses.replace(
        snapshot,
        entry_can_expand=neither,
        entry_can_collapse=neither,
        entry_utility=torch.zeros(6),
        cache_utility=torch.zeros(3),
    )
    free = dataclasses.replace(stuck, entry_can_expand=~neither, entry_can_collapse=~neither)
    config = ScoreLossConfig(
        ranking_weight=0, evidence_weight=0, balance_weight=0, legality_weight=1
    )
    terms = score_loss(lens, collate([stuck]), config)
    assert float(terms.legality.detach()) > 0.01
    terms.legality.backward()
    assert lens.entry_head.score.weight.grad.any()
    assert float(score_loss(lens, collate([free]), config).legality.detach()) == 0.0
    optimizer = torch.optim.Adam(lens.entry_head.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss = score_loss(lens, collate([stuck]), config)
        loss.legality.backward()
        optimizer.step()
    assert float(loss.legality.detach()) < 0.1 * float(terms.legality.detach())


def test_the_right_scores_cost_nothing():
    lens = make_lens(noise=0.3)
    snapshots = [draw_snapshot(i, measured=1.0) for i in range(3)]
    for index, snapshot in enumerate(snapshots):
        alone = collate([snapshot])
        with torch.no_grad():
            scores = lens(alone.entries, alone.cache, alone.tail)
        snapshots[index] = dataclasses.replace(
            snapshot, entry_utility=scores.entry[0], cache_utility=scores.cache[0]
        )
    terms = score_loss(lens, collate(snapshots), ScoreLossConfig())
    assert float(terms.regression.detach()) == pytest.approx(0, abs=1e-8)
    assert float(terms.balance.detach()) == pytest.approx(0, abs=1e-8)


def test_single_large_errors_count_linearly():
    lens = make_lens(noise=0.0)  # scores nothing
    costs = []
    for nats in (10.0, 20.0, 30.0):
        truth = torch.tensor([nats, 0.0, 0.0])
        snapshot = dataclasses.replace(draw_snapshot(1, n=0), cache_utility=truth)
        terms = score_loss(lens, collate([snapshot]), ScoreLossConfig())
        costs.append(float(terms.regression.detach()))
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0])
    assert costs[1] - costs[0] == pytest.approx(2.0 * 10 / 3)


def test_training_learns_worth_that_a_feature_tells():
    lens = make_lens(noise=0.0)
    column = FEATURE_NAMES.index("lexical")
    snapshots = []
    for seed in range(80):
        snapshot = draw_snapshot(seed, n=2, m=6)
        truth = 2 * snapshot.cache_features[:, column]
        unknown = torch.full((6,), torch.nan)
        snapshots.append(dataclasses.replace(snapshot, cache_utility=truth, cache_evidence=unknown))
    optimizer = torch.optim.AdamW(lens.parameters(), lr=0.02)
    batch, unseen = collate(snapshots[:60]), collate(snapshots[60:])
    for _ in range(60):
        optimizer.zero_grad()
        score_loss(lens, batch, ScoreLossConfig()).loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores = lens(unseen.entries, unseen.cache, unseen.tail).cache.flatten()
    assert rank_correlation(scores, unseen.cache_utility.flatten()) > 0.8


# Calibration


values = st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=30)


@given(values, st.floats(-5, 5))
def test_calibration_recovers_a_known_factor(numbers, factor):
    scores = torch.tensor(numbers, dtype=torch.float64)
    found = calibration(scores, factor * scores)
    if float(scores.pow(2).sum()) > 1e-12:
        assert found == pytest.approx(factor, abs=1e-6)
    else:
        assert found == 1.0


@given(values, st.integers(0, 1000))
def test_no_other_factor_is_closer(numbers, seed):
    scores = torch.tensor(numbers, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    truth = 2 * scores + torch.randn(scores.shape, generator=generator, dtype=torch.float64)
    factor = calibration(scores, truth)

    def error(scale):
        return float((scale * scores - truth).pow(2).sum())

    assert all(error(factor) <= error(factor + step) + 1e-9 for step in (-1, -0.01, 0.01, 1))


def test_calibration_of_nothing_changes_nothing():
    assert calibration(torch.zeros(0), torch.zeros(0)) == 1.0
    assert calibration(torch.zeros(3), torch.ones(3)) == 1.0


# Rank correlation


def ranks_by_counting(series):
    """One plus how many are smaller, plus half of the others that are equal."""
    return [
        1 + sum(other < value for other in series) + (series.count(value) - 1) / 2
        for value in series
    ]


def pearson(left, right):
    a, b = mean(left), mean(right)
    covariance = sum((x - a) * (y - b) for x, y in zip(left, right, strict=True))
    spread = sum((x - a) ** 2 for x in left) * sum((y - b) ** 2 for y in right)
    return covariance / math.sqrt(spread) if spread else math.nan


# Few values, so that ties are common.
series = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=30)


@given(series)
def test_rank_correlation_by_counting(points):
    left, right = ([point[side] for point in points] for side in (0, 1))
    found = rank_correlation(torch.tensor(left).float(), torch.tensor(right).float())
    expected = pearson(ranks_by_counting(left), ranks_by_counting(right))
    assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


@pytest.mark.filterwarnings("error")
def test_rank_correlation_of_too_little_is_unknown():
    for count in (0, 1):
        assert math.isnan(rank_correlation(torch.zeros(count), torch.zeros(count)))
    assert math.isnan(rank_correlation(torch.zeros(3), torch.arange(3.0)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ranking_weight": -1}, "'ranking_weight' has value -1"),
        ({"huber": 0}, "'huber' has value 0"),
        ({"legality_weight": float("nan")}, "'legality_weight' has value nan"),
        ({"calm_weight": 1}, "unknown key 'calm_weight'"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        ScoreLossConfig.parse(values)


def test_strange_keys_deal_out_the_relevances_of_keys_and_nothing_else():
    snapshots = [draw_snapshot(seed, m=8) for seed in range(40)]
    before = [snapshot.cache_features.clone() for snapshot in snapshots]
    strange = strange_keys(snapshots, 0.5, 7)
    columns = [i for i, name in enumerate(FEATURE_NAMES) if name.startswith("learned")]
    others = [i for i in range(N_FEATURES) if i not in columns]
    dealt = 0
    for old, new, features in zip(snapshots, strange, before, strict=True):
        assert torch.equal(old.cache_features, features), "what was recorded stays"
        assert torch.equal(new.cache_features[:, others], features[:, others])
        rows = new.cache_features[:, columns]
        assert sorted(rows.tolist()) == sorted(features[:, columns].tolist()), "together"
        dealt += not torch.equal(rows, features[:, columns])
    assert 10 <= dealt <= 30
    again = strange_keys(snapshots, 0.5, 7)
    assert all(
        torch.equal(a.cache_features, b.cache_features) for a, b in zip(strange, again, strict=True)
    )
    untouched = strange_keys(snapshots, 0.0, 7)
    assert all(
        torch.equal(new.cache_features, features)
        for new, features in zip(untouched, before, strict=True)
    )
