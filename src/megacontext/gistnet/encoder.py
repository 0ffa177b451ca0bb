"""The learned encoder of a ``transformer`` GistNet."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megacontext.gistnet.blocks import EncoderLayer, ResidualMLP, SlotQueries
from megacontext.gistnet.config import GistNetConfig
from megacontext.gistnet.gists import Gists, pool_mean


class BlockEncoder(nn.Module):
    """The learned part of a ``transformer`` GistNet: children and context in, gists out."""

    def __init__(self, config: GistNetConfig) -> None:
        super().__init__()
        self.config = config
        width, factor = config.d_model, config.width_factor
        self.lift: nn.Linear | None = None
        self.lower: nn.Linear | None = None
        if factor > 1:
            self.lift = nn.Linear(width, config.gist_width, bias=False)
            self.lower = nn.Linear(config.gist_width, width, bias=False)
            with torch.no_grad():
                self.lift.weight.copy_(torch.eye(width).repeat(factor, 1))
                self.lower.weight.copy_(torch.eye(width).repeat(1, factor) / factor)
        self.in_norm = nn.RMSNorm(width)
        self.levels = nn.Embedding(config.max_levels, width)
        nn.init.normal_(self.levels.weight, std=0.1)
        self.layers = nn.ModuleList(
            EncoderLayer(width, config.n_heads, config.d_ff, config.rope_theta)
            for _ in range(config.n_layers)
        )
        self.slots: SlotQueries | None = None
        if config.pooling == "slots":
            self.slots = SlotQueries(width, config.n_heads, factor)
        self.mlp = ResidualMLP(width, config.d_ff)
        self.out_norm = nn.RMSNorm(width)
        self.out = nn.Linear(width, width if self.slots else config.gist_width, bias=False)
        nn.init.zeros_(self.out.weight)
        self.fidelity = nn.Linear(width, 1)
        nn.init.zeros_(self.fidelity.weight)
        nn.init.constant_(self.fidelity.bias, -2.0)

    def embed(self, vectors: Tensor, level: int) -> Tensor:
        """Token embeddings (``level`` 1) or gists, ``[..., width]``, as ``[..., d_model]``."""
        if level > 1 and self.lower is not None:
            vectors = self.lower(vectors)
        told = min(level, self.config.told_levels or level)
        return self.in_norm(vectors) + self.levels.weight[told - 1]

    def forward(self, hidden: Tensor, valid: Tensor | None, children: Tensor) -> Gists:
        """Encodes the last blocks of each stream.

        Args:
            hidden: ``[streams, context_blocks + blocks, block_size, d_model]``.
            valid: bool of the same shape without the last dimension, or ``None``.
            children: ``[streams * blocks, block_size, width]``, what ``hidden`` ends with.

        Returns:
            ``streams * blocks`` gists.
        """
        blocks = len(children) // len(hidden) if len(hidden) else 1
        windows = self.config.layer_windows
        for index, layer in enumerate(self.layers):
            reached = min(hidden.shape[1], blocks + sum(windows[index + 1 :]))
            hidden = layer(hidden, valid, windows[index], reached)
            valid = None if valid is None else valid[:, valid.shape[1] - reached :]
        states = hidden.flatten(0, 1)
        pooled = states.mean(dim=1, keepdim=True) if self.slots is None else self.slots(states)
        pooled = self.out_norm(self.mlp(pooled))
        # In units of the children's size, so that one learning rate suits every base model.
        size = children.pow(2).mean(dim=(1, 2)).sqrt()
        change = self.out(pooled).flatten(1) * size[:, None]
        mean = pool_mean(children, rescale=self.config.rescale)
        if self.lift is not None and mean.shape[-1] == self.config.d_model:
            mean = self.lift(mean)
        fidelity = F.softplus(self.fidelity(pooled.mean(dim=1))).squeeze(-1)
        return Gists(mean + change, fidelity)
