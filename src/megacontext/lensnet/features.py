"""The numbers that describe a span to LensNet, in a fixed order.

Order and scale are part of every checkpoint's contract: a feature is added at the end or not at
all. Every feature is about 1 in size, and none depends on padding or on the order of the spans.

=====  ====================  =====================================================================
index  name                  value
=====  ====================  =====================================================================
0      level                 level / 8
1      log_width             ln(1 + tokens the span covers) / 10
2      log_distance          ln(1 + tokens between the span's end and the cursor) / 10
3      log_cost              ln(1 + token-equivalents the span costs, or would cost) / 10
4      depth                 expands needed to reach it from the working context / 8
5      in_context            1 if the span is an entry of the working context
6      in_tail               1 if it reaches into the tail
7      newest                1 if it is among the newest gists of its level
8      root                  1 if no gist covers it yet
9      proposal              1 if an index proposed it
10     fidelity              ln(1 + predicted nats per token that its gist loses)
11     fidelity_known        1 if there is such a prediction
12     lexical               ln(1 + BM25 score)
13     lexical_relative      BM25 score / the best one among the spans
14     lexical_known         1 if it was scored lexically
15     attention             the base model's attention to it, 0 to 1
16     attention_relative    attention / the highest among the spans
17     attention_known       1 if attention was measured
18     learned               relevance of its lens key
19     learned_relative      exp(relevance - the highest among the spans)
20     learned_known         1 if its key was scored
21     likelihood            nats that it makes the question likelier / 10
22     likelihood_relative   exp((nats - the most among the spans that are news) / 4), 1 at most
23     likelihood_known      1 if the base model read it with the question
=====  ====================  =====================================================================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext.errors import InputError

FEATURE_NAMES = (
    "level",
    "log_width",
    "log_distance",
    "log_cost",
    "depth",
    "in_context",
    "in_tail",
    "newest",
    "root",
    "proposal",
    "fidelity",
    "fidelity_known",
    "lexical",
    "lexical_relative",
    "lexical_known",
    "attention",
    "attention_relative",
    "attention_known",
    "learned",
    "learned_relative",
    "learned_known",
    "likelihood",
    "likelihood_relative",
    "likelihood_known",
)
N_FEATURES = len(FEATURE_NAMES)
# A question is some twenty tokens, and a block that tells of it makes it 10 to 30 nats likelier.
_NATS_APART = 4.0


@dataclass(frozen=True)
class SpanFacts:
    """What is known about the spans of a batch, in natural units.

    All tensors are ``[batch, spans]`` but for ``cursor`` and ``tail_start``, which are int64
    ``[batch]``. A score that was not measured is NaN.

    Attributes:
        levels: int64, 0 for a raw block.
        starts: int64, first token.
        stops: int64, one past the last token.
        costs: int64, token-equivalents.
        depths: int64, expands between the working context and the span (0 for its entries).
        fidelity: predicted nats per token, not negative.
        lexical: BM25 score, not negative.
        attention: attention mass, not negative.
        learned: relevance of the lens key, any sign.
        likelihood: nats that the span makes what is expected likelier, any sign.
        told: bool, it was raw before what is expected was known.
        in_context: bool.
        newest: bool.
        root: bool.
        proposal: bool.
        mask: bool, False for padding.
        cursor: one past the newest token.
        tail_start: first token of the tail.
    """

    levels: Tensor
    starts: Tensor
    stops: Tensor
    costs: Tensor
    depths: Tensor
    fidelity: Tensor
    lexical: Tensor
    attention: Tensor
    learned: Tensor
    likelihood: Tensor
    told: Tensor
    in_context: Tensor
    newest: Tensor
    root: Tensor
    proposal: Tensor
    mask: Tensor
    cursor: Tensor
    tail_start: Tensor


def span_features(facts: SpanFacts) -> Tensor:
    """Describes spans as float32 ``[batch, spans, N_FEATURES]``; padding is all zeros.

    Raises:
        InputError: the tensors' shapes differ, or a span ends before it starts.
    """
    _check_facts(facts)
    mask = facts.mask
    # An entry that is still open may reach beyond the cursor: its distance is 0, not negative.
    distance = (facts.cursor[:, None] - facts.stops).clamp_min(0)
    columns = [
        facts.levels / 8,
        _log(facts.stops - facts.starts) / 10,
        _log(distance) / 10,
        _log(facts.costs) / 10,
        facts.depths / 8,
        facts.in_context,
        facts.stops > facts.tail_start[:, None],
        facts.newest,
        facts.root,
        facts.proposal,
    ]
    fidelity, fidelity_known = _known(facts.fidelity, mask)
    columns += [fidelity.log1p(), fidelity_known]
    lexical, lexical_known = _known(facts.lexical, mask)
    columns += [lexical.log1p(), share_of_best(lexical), lexical_known]
    attention, attention_known = _known(facts.attention, mask)
    columns += [attention, share_of_best(attention), attention_known]
    learned, learned_known = _known(facts.learned, mask)
    columns += [learned, closeness(learned, learned_known), learned_known]
    likelihood, likelihood_known = _known(facts.likelihood, mask)
    likelier = closeness(likelihood / _NATS_APART, likelihood_known, facts.told)
    columns += [likelihood / 10, likelier, likelihood_known]
    stacked = torch.stack([column.to(torch.float32) for column in columns], dim=-1)
    return stacked.masked_fill(~mask[..., None], 0.0)


def _check_facts(facts: SpanFacts) -> None:
    shape = facts.mask.shape
    if facts.mask.ndim != 2 or facts.mask.dtype != torch.bool:
        raise InputError(f"mask is {facts.mask.dtype} {tuple(shape)}, expected bool [batch, spans]")
    for name, value in vars(facts).items():
        wanted = shape[:1] if name in {"cursor", "tail_start"} else shape
        if value.shape != wanted:
            raise InputError(f"{name} has shape {tuple(value.shape)}, expected {tuple(wanted)}")
    if bool((facts.mask & (facts.stops <= facts.starts)).any()):
        raise InputError("a span stops at or before its start; give token positions start < stop")


def _log(count: Tensor) -> Tensor:
    return count.to(torch.float32).log1p()


def _known(score: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    known = mask & ~score.isnan()
    return score.to(torch.float32).masked_fill(~known, 0.0), known


def _best(score: Tensor) -> Tensor:
    if not score.shape[1]:
        return score.new_zeros(len(score), 1)
    return score.amax(dim=1, keepdim=True)


def share_of_best(score: Tensor) -> Tensor:
    """Scores ``[batch, spans]``, not negative, over the best one of their row; 0 without any."""
    best = _best(score)
    return score / best.where(best > 0, torch.ones_like(best))


def closeness(score: Tensor, known: Tensor, apart: Tensor | None = None) -> Tensor:
    """``exp(score - best)`` of scores ``[batch, spans]``, 1 at most; 0 where none is known.

    Args:
        score: finite.
        known: bool, which scores there are.
        apart: bool; the best is sought among the known others, where there are any.
    """
    eligible = known if apart is None else known & ~apart
    eligible = torch.where(eligible.any(dim=1, keepdim=True), eligible, known)
    best = _best(score.masked_fill(~eligible, -torch.inf))
    return (score - best).clamp(max=0.0).exp().masked_fill(~known, 0.0)
