"""What a frozen model loses when it reads gists in place of tokens, window by window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from megacontext.errors import InputError
from megacontext.gistnet import GistNet
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.gist_features import GistFeatures
from megacontext.runtime.history_buffers import HistoryBuffers
from megacontext.runtime.window_batch import plain_states, window_states
from megacontext.runtime.window_layout import WindowLayout

HORIZON = 128
# Raw tokens at the end of every window: one that reads the context, those that are predicted, and
# what fills the last block.
_TAIL_BLOCKS = 5
VARIANTS = ("full", "gist", "mean", "dropped", "recency")


@dataclass(frozen=True)
class Substitution:
    """A window shape and which blocks of it become gists.

    Attributes:
        name: for reports.
        levels: per block of the context the level it is read at.
        recent: raw tokens of the ``recency`` variant; 0: as many as the context costs with gists.
    """

    name: str
    levels: tuple[int, ...]
    recent: int = 0

    def tokens(self, block_size: int) -> int:
        """Tokens of a window: the context and the tail."""
        return (len(self.levels) + _TAIL_BLOCKS) * block_size


@dataclass(frozen=True, eq=False)
class WindowNLL:
    """NLL of the tokens behind each window's context, by variant.

    Attributes:
        nll: by variant, float32 ``[windows, HORIZON]`` nats: ``full`` reads everything raw,
            ``gist`` reads gists where the substitution says so, ``mean`` the means of their
            embeddings, ``dropped`` leaves those blocks out, ``recency`` reads as many raw tokens as
            the gist variant has entries, the newest.
        cost: float32 ``[windows, HORIZON]``, KL from the full variant to the gist variant, in nats.
        predicted: float32 ``[windows]``, mean predicted fidelity of the gists read.
    """

    nll: dict[str, Tensor]
    cost: Tensor
    predicted: Tensor


@torch.inference_mode()
def measure(
    base: BaseModel,
    gistnet: GistNet,
    ids: Tensor,
    substitution: Substitution,
    *,
    variants: Sequence[str] = VARIANTS,
    batch: int = 8,
) -> WindowNLL:
    """Measures all variants on the same windows.

    The first raw token behind the context is read by all variants and predicted by none: gists
    read as keys and values have no row of their own to predict from.

    Args:
        base: the frozen base model.
        gistnet: makes and reads the gists.
        ids: int64 ``[windows, tokens]``, see :meth:`Substitution.tokens`.
        substitution: what becomes a gist.
        variants: which to measure; ``full`` and ``gist`` always are.
        batch: windows per forward.

    Raises:
        InputError: the windows have another length or need more positions than the base has.
    """
    size = gistnet.config.block_size
    expected = substitution.tokens(size)
    if ids.ndim != 2 or ids.shape[1] != expected or expected > base.max_positions:
        raise InputError(
            f"windows are {tuple(ids.shape)}, expected [n, {expected}] and at most "
            f"{base.max_positions} tokens"
        )
    wanted = [v for v in VARIANTS if v in variants or v in ("full", "gist")]
    parts = [
        _measure_batch(base, gistnet, chunk, substitution, wanted)
        for chunk in ids.to(base.device).split(batch)
    ]
    return WindowNLL(
        {v: torch.cat([part.nll[v] for part in parts]) for v in wanted},
        torch.cat([part.cost for part in parts]),
        torch.cat([part.predicted for part in parts]),
    )


def _measure_batch(
    base: BaseModel, gistnet: GistNet, ids: Tensor, substitution: Substitution, wanted: list[str]
) -> WindowNLL:
    size = gistnet.config.block_size
    levels = torch.tensor([*substitution.levels, *[0] * _TAIL_BLOCKS], device=ids.device)
    levels = levels.expand(len(ids), -1)
    embeddings = base.embed(ids)
    layout = WindowLayout.of(levels, block_size=size, slots=gistnet.cost)
    context = len(substitution.levels) * size
    recent = substitution.recent or min(context, _cost(layout, substitution, gistnet.cost, size))
    log_probs: dict[str, Tensor] = {}
    predicted = torch.zeros(len(ids))
    for variant in wanted:
        if variant in ("gist", "mean"):
            net = gistnet if variant == "gist" else GistNet.untrained(base.d_model, block_size=size)
            shape = layout
            if net.cost != gistnet.cost:
                shape = WindowLayout.of(levels, block_size=size, slots=net.cost)
            features = GistFeatures(base, net.config).over(embeddings)
            buffers = HistoryBuffers.encode(
                net, embeddings, levels=2 if 2 in levels else 1, features=features
            )
            states = window_states(base, net, buffers, shape)
            if variant == "gist":
                predicted = buffers.fidelity.gather(1, layout.gists).float().mean(1).cpu()
        else:
            rows = embeddings
            if variant == "dropped":
                index = layout.tokens[..., None].expand(-1, -1, embeddings.shape[-1])
                rows = embeddings.gather(1, index)
            elif variant == "recency":
                rows = embeddings[:, context - recent :]
            positions = torch.arange(rows.shape[1], device=rows.device).expand(len(rows), -1)
            states = plain_states(base, rows, positions)
        log_probs[variant] = tail_log_probs(base, states, size)
    targets = ids[:, context + 1 : context + 1 + HORIZON, None]
    nll = {v: -p.gather(-1, targets)[..., 0].cpu() for v, p in log_probs.items()}
    cost = F.kl_div(log_probs["gist"], log_probs["full"], log_target=True, reduction="none")
    return WindowNLL(nll, cost.sum(-1).cpu(), predicted)


def tail_log_probs(base: BaseModel, states: Tensor, size: int) -> Tensor:
    """Log-probabilities ``[windows, HORIZON, vocab]`` behind the context of every window.

    Args:
        base: the frozen base model.
        states: ``[windows, rows, d_model]``, its last hidden states over the windows.
        size: tokens of a block.
    """
    first = states.shape[1] - _TAIL_BLOCKS * size
    logits = base.model.lm_head(states[:, first : first + HORIZON])
    return F.log_softmax(logits.float(), dim=-1)


def _cost(layout: WindowLayout, substitution: Substitution, slots: int, size: int) -> int:
    """Token-equivalents of the context with its gists."""
    return substitution.levels.count(0) * size + layout.n_gists * slots
