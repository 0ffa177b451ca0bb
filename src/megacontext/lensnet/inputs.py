"""Padded batches that LensNet reads, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megacontext.errors import InputError
from megacontext.lensnet.config import LensNetConfig


@dataclass(frozen=True)
class EntryFeatures:
    """Entries of the working context.

    Attributes:
        vectors: ``[b, n, gist_width]``: the entry's gist; for a raw block its level-1 gist, zeros
            while there is none.
        features: ``[b, n, n_features]``, from :func:`megacontext.lensnet.features.span_features`.
        mask: bool ``[b, n]``, False for padding.
        can_expand: bool ``[b, n]``.
        can_collapse: bool ``[b, n]``, both from
            :func:`megacontext.lensnet.legality.entry_legality`.
    """

    vectors: Tensor
    features: Tensor
    mask: Tensor
    can_expand: Tensor
    can_collapse: Tensor


@dataclass(frozen=True)
class CacheFeatures:
    """The gist cache: spans outside the window that detail might move to.

    Proposals of the indices, the newest gists and the roots.

    Attributes:
        vectors: ``[b, m, gist_width]``; for a raw block its level-1 gist.
        features: ``[b, m, n_features]``.
        mask: bool ``[b, m]``, False for padding.
    """

    vectors: Tensor
    features: Tensor
    mask: Tensor


@dataclass(frozen=True)
class TailStates:
    """What the base model thinks at the newest tokens.

    Attributes:
        hidden: ``[b, t, d_model]``, hidden states, oldest first.
        mask: bool ``[b, t]``, False for padding.
    """

    hidden: Tensor
    mask: Tensor


class Scores(NamedTuple):
    """Lens scores in nats.

    Attributes:
        entry: ``[b, n]``, signed: positive asks to expand, negative to collapse; 0 where the move
            asked for would be illegal, and on padding.
        cache: ``[b, m]``, what bringing the span into the window would win; 0 on padding.
    """

    entry: Tensor
    cache: Tensor


def check_inputs(
    config: LensNetConfig, entries: EntryFeatures, cache: CacheFeatures, tail: TailStates
) -> None:
    """Checks the shapes of a batch against the configuration.

    Raises:
        InputError: a tensor does not fit; the message names it and the shapes.
    """
    batch = len(entries.mask)
    for name, spans in (("entries", entries), ("cache", cache)):
        count = spans.mask.shape[-1]
        _expect(f"{name}.mask", spans.mask, (batch, count), boolean=True)
        _expect(f"{name}.vectors", spans.vectors, (batch, count, config.gist_width))
        _expect(f"{name}.features", spans.features, (batch, count, config.n_features))
    for name in ("can_expand", "can_collapse"):
        value = getattr(entries, name)
        _expect(f"entries.{name}", value, tuple(entries.mask.shape), boolean=True)
    check_tail(config, tail.hidden, tail.mask, batch=batch)


def check_tail(
    config: LensNetConfig, hidden: Tensor, mask: Tensor, *, batch: int | None = None
) -> None:
    """Checks the tail's shapes.

    Raises:
        InputError: a tensor does not fit.
    """
    batch = len(hidden) if batch is None else batch
    count = mask.shape[-1] if mask.ndim else 0
    _expect("the tail's mask", mask, (batch, count), boolean=True)
    _expect("the tail's hidden states", hidden, (batch, count, config.d_model))


def _expect(name: str, value: Tensor, shape: tuple[int, ...], *, boolean: bool = False) -> None:
    right_type = value.dtype == torch.bool if boolean else value.is_floating_point()
    if tuple(value.shape) != shape or not right_type:
        kind = "bool" if boolean else "floating"
        raise InputError(
            f"{name}: {value.dtype} {tuple(value.shape)}, expected {kind} {shape}; see "
            "megacontext.lensnet.inputs"
        )
