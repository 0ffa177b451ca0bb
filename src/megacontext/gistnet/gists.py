"""Gists as they leave GistNet, and the mean pool every GistNet starts from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Gists(NamedTuple):
    """New gists.

    Attributes:
        vectors: ``[n, gist_width]``.
        fidelity: ``[n]``, predicted KL divergence in nats per token that reading the gist in place
            of its span costs; NaN where the GistNet has no such prediction (kind ``mean``).
    """

    vectors: Tensor
    fidelity: Tensor


def pool_mean(children: Tensor, *, rescale: bool) -> Tensor:
    """Mean over the children.

    Args:
        children: ``[n, block_size, width]``.
        rescale: stretch each mean to the mean Euclidean norm of its children; a mean of exactly
            zero stays zero.

    Returns:
        ``[n, width]``.
    """
    mean = children.mean(dim=1)
    if not rescale:
        return mean
    wanted = children.norm(dim=-1).mean(dim=1, keepdim=True)
    norm = mean.norm(dim=-1, keepdim=True)
    stretch = torch.where(norm > 0, wanted / norm.where(norm > 0, torch.ones_like(norm)), 0.0)
    return mean * stretch
