"""The loss of LensNet's second stage: scores that are the measured worth of detail, in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from megacontext.config import FrozenConfig
from megacontext.lensnet import (
    FEATURE_NAMES,
    Legality,
    LensNet,
    Scores,
    Snapshot,
    SnapshotBatch,
    collate,
    mask_scores,
)

# Utilities closer than this, in nats, are not ranked: they may be rounding or chance.
_RANKED = 0.1
# A score that stands for none: finite, so that there is a gradient.
_NOTHING = -1e4
_KEY_FEATURES = [FEATURE_NAMES.index(name) for name in FEATURE_NAMES if "learned" in name]


class ScoreLossConfig(FrozenConfig):
    """Weights of the terms.

    Attributes:
        ranking_weight: of putting proposed blocks of one snapshot into the right order.
        evidence_weight: of scoring each block of the evidence above what is none, where it is known
            which is which: that holds of all proposals, and few of them are measured.
        balance_weight: of asking, summed over a snapshot, for as many nats as there are to win.
        legality_weight: of staying at 0 where a move is illegal, before the mask.
        huber: nats; errors beyond it count linearly, since single answers can be worth ten nats.
    """

    ranking_weight: float = Field(default=0.3, ge=0, allow_inf_nan=False)
    evidence_weight: float = Field(default=5.0, ge=0, allow_inf_nan=False)
    balance_weight: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    legality_weight: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    huber: float = Field(default=2.0, gt=0, allow_inf_nan=False)


@dataclass(frozen=True, eq=False)
class ScoreTerms:
    """The loss and its parts, scalars."""

    loss: Tensor
    regression: Tensor
    ranking: Tensor
    evidence: Tensor
    balance: Tensor
    legality: Tensor


def score_loss(lens: LensNet, batch: SnapshotBatch, config: ScoreLossConfig) -> ScoreTerms:
    """Regression, ranking, evidence, balance and legality of the scores of recorded snapshots."""
    free = lens.unmasked(batch.entries, batch.cache, batch.tail)
    entries = batch.entries
    legal = Legality(entries.mask & entries.can_expand, entries.mask & entries.can_collapse)
    scores = Scores(mask_scores(free.entry, legal), free.cache)
    known = ~batch.cache_utility.isnan()
    cache_truth = batch.cache_utility.nan_to_num()
    entry_known = ~batch.entry_utility.isnan()
    entry_truth = batch.entry_utility.nan_to_num()
    regression = _huber(scores.cache, cache_truth, known, config.huber) + _huber(
        scores.entry, entry_truth, entry_known, config.huber
    )
    ranking = _ranking(scores.cache, cache_truth, known)
    evidence = _evidence(scores.cache, batch.cache_evidence)
    wanted = (cache_truth.clamp(min=0) * known).sum(dim=1)
    asked = (scores.cache.clamp(min=0) * known).sum(dim=1)
    balance = F.huber_loss(asked.log1p(), wanted.log1p())
    legality = _illegal(free.entry, batch)
    loss = (
        regression
        + config.ranking_weight * ranking
        + config.evidence_weight * evidence
        + config.balance_weight * balance
        + config.legality_weight * legality
    )
    return ScoreTerms(loss, regression, ranking, evidence, balance, legality)


def strange_keys(snapshots: Sequence[Snapshot], share: float, seed: int) -> list[Snapshot]:
    """Snapshots, of some of which the keys' relevances are dealt out to other proposals.

    Args:
        snapshots: as recorded; they are not changed.
        share: how likely that is for each of them.
        seed: decides for which, and how.
    """
    generator = torch.Generator().manual_seed(seed)
    told: list[Snapshot] = []
    for snapshot in snapshots:
        features = snapshot.cache_features
        if float(torch.rand(1, generator=generator)) < share:
            dealt = torch.randperm(len(features), generator=generator)
            features = features.clone()
            features[:, _KEY_FEATURES] = features[dealt][:, _KEY_FEATURES]
        told.append(replace(snapshot, cache_features=features))
    return told


@torch.no_grad()
def mean_loss(
    lens: LensNet, snapshots: Sequence[Snapshot], config: ScoreLossConfig, batch_size: int
) -> float:
    """The loss over all of ``snapshots``, in batches of ``batch_size``."""
    total = 0.0
    for start in range(0, len(snapshots), batch_size):
        part = snapshots[start : start + batch_size]
        total += float(score_loss(lens, collate(part), config).loss) * len(part)
    return total / max(1, len(snapshots))


def _huber(score: Tensor, truth: Tensor, known: Tensor, delta: float) -> Tensor:
    error = F.huber_loss(score, truth, reduction="none", delta=delta)
    return (error * known).sum() / known.sum().clamp(min=1)


def _ranking(score: Tensor, truth: Tensor, known: Tensor) -> Tensor:
    """Logistic loss over pairs of one snapshot whose worth differs."""
    better = truth[:, :, None] > truth[:, None, :] + _RANKED
    pairs = better & known[:, :, None] & known[:, None, :]
    margin = score[:, :, None] - score[:, None, :]
    return (F.softplus(-margin) * pairs).sum() / pairs.sum().clamp(min=1)


def _evidence(score: Tensor, evidence: Tensor) -> Tensor:
    """InfoNCE (arXiv 1807.03748), once for every block of a snapshot's evidence."""
    tells, others = evidence == 1, evidence == 0
    tells = tells & others.any(dim=1, keepdim=True)
    against = score.masked_fill(~others, _NOTHING).logsumexp(dim=1, keepdim=True)
    losses = (torch.logaddexp(against, score) - score) * tells
    return losses.sum() / tells.sum().clamp(min=1)


def _illegal(free: Tensor, batch: SnapshotBatch) -> Tensor:
    entries = batch.entries
    up = free.clamp(min=0) * (entries.mask & ~entries.can_expand)
    down = (-free).clamp(min=0) * (entries.mask & ~entries.can_collapse)
    return (up + down).pow(2).sum() / entries.mask.sum().clamp(min=1)


@torch.no_grad()
def calibration(scores: Tensor, truth: Tensor) -> float:
    """The factor that brings scores closest to the truth, by least squares; 1 without scores.

    Args:
        scores: ``[n]``.
        truth: ``[n]``, in nats.
    """
    power = float(scores.pow(2).sum())
    return float((scores * truth).sum()) / power if power > 0 else 1.0


def rank_correlation(first: Tensor, second: Tensor) -> float:
    """Spearman's rank correlation (1904) of two series ``[n]``; NaN where one is constant."""
    if len(first) < 2:
        return math.nan
    ranks = torch.stack((_ranks(first), _ranks(second)))
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks, ties at their mean."""
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[place]
