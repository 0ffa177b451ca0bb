"""Where to look: lens keys of gists, queries of the tail, and their late interaction."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megacontext.errors import InputError
from megacontext.lensnet.blocks import CrossAttention, ResidualMLP, blank_padding
from megacontext.lensnet.config import LensNetConfig

KEYS_PER_CHUNK = 65_536


class TokenKeys(nn.Module):
    """A key vector for every token of the vocabulary; a text's is the sum over its tokens.

    A soft lexical match: words of one meaning can learn one direction, words that tell nothing can
    shrink. Random directions keep apart what is different (Johnson-Lindenstrauss), so that sums
    compare as bags of words before any training.
    """

    def __init__(self, config: LensNetConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.key_vocabulary, config.key_width)
        nn.init.normal_(self.embed.weight, std=config.key_width**-0.5)

    def forward(self, tokens: Tensor, weights: Tensor | None = None) -> Tensor:
        """Sums over tokens.

        Args:
            tokens: int64 ``[n, t]``; negative where there is none.
            weights: ``[n, t, q]``, of every token in each of ``q`` sums; ``None``: 1, one sum.

        Returns:
            ``[n, key_width]``, or ``[n, q, key_width]`` with weights.
        """
        vectors = self.embed(tokens.clamp(min=0)).masked_fill((tokens < 0)[..., None], 0.0)
        if weights is None:
            return vectors.sum(dim=1)
        return torch.einsum("ntq,ntk->nqk", weights, vectors)


class KeyEncoder(nn.Module):
    """Gist and level (and tokens, where configured) to one key of length 1."""

    def __init__(self, config: LensNetConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.gist_width)
        self.levels = nn.Embedding(config.max_levels + 1, config.gist_width)
        nn.init.zeros_(self.levels.weight)
        self.map = nn.Linear(config.gist_width, config.key_width, bias=False)
        if config.key_vocabulary:
            nn.init.zeros_(self.map.weight)

    def forward(self, gists: Tensor, levels: Tensor, head_start: Tensor | None) -> Tensor:
        """Maps ``[n, gist_width]`` and ``[n]`` to ``[n, key_width]``."""
        learned = self.map(self.norm(gists) + self.levels(levels))
        return unit(learned if head_start is None else learned + head_start)


class TailEncoder(nn.Module):
    """Learned queries that read the tail's hidden states, newest told from oldest."""

    def __init__(self, config: LensNetConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model)
        self.map = nn.Linear(config.d_model, config.d_hidden, bias=False)
        self.age = nn.Linear(1, config.d_hidden, bias=False)
        self.queries = nn.Parameter(torch.randn(config.n_queries, config.d_hidden))
        self.attention = CrossAttention(config.d_hidden, config.n_heads)
        self.mlp = ResidualMLP(config.d_hidden, config.d_ff)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Maps ``hidden [b, t, d_model]``, ``mask [b, t]`` to ``[b, n_queries, d_hidden]``."""
        hidden = blank_padding(hidden.to(self.map.weight.dtype), mask)
        newer = mask.flip(1).cumsum(1).flip(1) - mask.long()
        age = newer.to(hidden.dtype).log1p()[..., None]
        memory = self.map(self.norm(hidden)) + self.age(age)
        return self.mlp(self.attention(self.queries.expand(len(hidden), -1, -1), memory, mask))


class TokenGates(nn.Module):
    """How much each token of the tail counts in each query's sum, by what the base thinks of it."""

    def __init__(self, config: LensNetConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model)
        self.map = nn.Linear(config.d_model, config.n_queries)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Maps ``hidden [b, t, d_model]`` to ``[b, t, n_queries]`` from 0 to 2, at first 1."""
        hidden = blank_padding(hidden.to(self.map.weight.dtype), mask)
        return 2 * torch.sigmoid(self.map(self.norm(hidden))) * mask[..., None]


class QueryHead(nn.Module):
    """States of the tail (and its tokens, where configured) to query vectors."""

    def __init__(self, config: LensNetConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_hidden)
        self.map = nn.Linear(config.d_hidden, config.key_width, bias=False)
        if config.key_vocabulary:
            nn.init.zeros_(self.map.weight)
        self.log_scale = nn.Parameter(torch.tensor(config.key_width).log() / 2)

    def forward(self, states: Tensor, head_start: Tensor | None) -> Tensor:
        """Maps ``[b, n_queries, d_hidden]`` to ``[b, n_queries, key_width]``."""
        learned = self.map(self.norm(states))
        raw = learned if head_start is None else learned + head_start
        return unit(raw) * self.log_scale.exp()


def unit(x: Tensor) -> Tensor:
    """Scales ``[..., width]`` to length 1; zero stays zero, with a finite gradient."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-8) * x.shape[-1] ** -0.5


def relevance(
    queries: Tensor,
    keys: Tensor,
    *,
    interaction: Literal["max", "mean"] = "max",
    chunk: int = KEYS_PER_CHUNK,
) -> Tensor:
    """Late interaction (ColBERT, arXiv 2004.12832): the best, or mean, dot product of any query.

    Args:
        queries: ``[b, n_queries, key_width]``.
        keys: ``[n, key_width]``, shared by the batch, or ``[b, n, key_width]``; any floating type.
        interaction: how a key's dot products become one number.
        chunk: keys per pass; memory beyond the result is ``b * n_queries * chunk`` numbers.

    Returns:
        ``[b, n]``, in the type of ``queries``.

    Raises:
        InputError: the shapes do not fit.
    """
    fits = queries.ndim == 3 and keys.ndim in (2, 3) and keys.shape[-1] == queries.shape[-1]
    if not fits or (keys.ndim == 3 and len(keys) != len(queries)):
        raise InputError(
            f"queries {tuple(queries.shape)} do not fit keys {tuple(keys.shape)}; expected "
            "[b, n_queries, key_width] and [n, key_width] or [b, n, key_width]"
        )
    if chunk < 1:
        raise InputError(f"chunk is {chunk}, expected at least 1")
    parts: list[Tensor] = []
    for part in keys.split(chunk, dim=-2):
        dots = queries @ part.to(queries.dtype).transpose(-1, -2)
        parts.append(dots.amax(dim=1) if interaction == "max" else dots.mean(dim=1))
    return torch.cat(parts, dim=1)
