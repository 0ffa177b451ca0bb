"""Readers: what the base model gets to see of a stored gist."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megacontext.gistnet.blocks import ResidualMLP
from megacontext.gistnet.config import GistNetConfig


class EmbeddingReader(nn.Module):
    """Reads a gist as ``slots`` input embeddings.

    With one slot and ``gist_width == d_model`` the gist *is* the embedding and there are no
    parameters, unless ``reader_d_ff`` asks for a residual MLP, which starts as the identity.
    Otherwise a linear map starts by handing slot ``s`` the ``s``-th ``d_model`` numbers of the
    gist (counted modulo the gist's width).
    """

    def __init__(self, config: GistNetConfig) -> None:
        super().__init__()
        self.slots = config.slots
        self.d_model = config.d_model
        self.told_levels = config.told_levels or config.max_levels
        self.split: nn.Linear | None = None
        self.mlp: ResidualMLP | None = None
        self.levels: nn.Embedding | None = None
        if config.slots > 1 or config.gist_width != config.d_model:
            self.split = nn.Linear(config.gist_width, config.slots * config.d_model)
            _init_chunks(self.split, config)
        if config.reader_d_ff:
            self.mlp = ResidualMLP(config.d_model, config.reader_d_ff, zero_init=True)
            self.levels = nn.Embedding(config.max_levels + 1, config.d_model)
            nn.init.zeros_(self.levels.weight)

    def forward(self, gists: Tensor, levels: Tensor, slots: int) -> Tensor:
        """Reads ``[n, gist_width]`` of ``levels [n]`` as its first ``[n, slots, d_model]``."""
        x = gists
        if self.split is not None:
            size = slots * self.d_model
            x = F.linear(gists, self.split.weight[:size], self.split.bias[:size])
        x = x.unflatten(-1, (slots, self.d_model))
        if self.mlp is not None and self.levels is not None:
            x = self.mlp(x, self.levels(levels.clamp(max=self.told_levels))[:, None])
        return x


def _init_chunks(split: nn.Linear, config: GistNetConfig) -> None:
    identity = torch.eye(config.d_model)
    with torch.no_grad():
        split.weight.zero_()
        split.bias.zero_()
        for slot in range(config.slots):
            rows = slice(slot * config.d_model, (slot + 1) * config.d_model)
            start = slot % config.width_factor * config.d_model
            split.weight[rows, start : start + config.d_model] = identity


class KVReader(nn.Module):
    """Reads a gist as ``slots`` keys and values in every layer of the base model.

    The gist costs the base model no forward pass and means the same whatever precedes it. One
    stored vector gives several keys per head, since with one key it could answer one query only.
    Keys come un-rotated: the caller applies the base model's rotary positions. All layers, slots
    and gists are computed in one product per map.
    """

    def __init__(self, config: GistNetConfig) -> None:
        super().__init__()
        self.config = config
        layers, slots, heads = config.kv_layers, config.slots, config.kv_heads
        width, rank = config.gist_width, config.kv_rank
        key_size, value_size = heads * config.kv_head_dim, heads * config.kv_value_dim
        self.norm = nn.RMSNorm(width)
        self.levels = nn.Embedding(config.max_levels + 1, width)
        nn.init.zeros_(self.levels.weight)
        self.mlp: ResidualMLP | None = None
        if config.reader_d_ff:
            self.mlp = ResidualMLP(width, config.reader_d_ff, zero_init=True)
        self.down: nn.Parameter | None = None
        if rank:
            self.down = nn.Parameter(torch.randn(slots, width, rank) * width**-0.5)
            shape = (layers, rank)
        else:
            shape = (layers, slots, width)
        scale = shape[-1] ** -0.5
        self.key_map = nn.Parameter(torch.randn(*shape, key_size) * scale)
        self.value_map = nn.Parameter(torch.randn(*shape, value_size) * scale)
        self.key_bias = nn.Parameter(torch.zeros(layers, 1, slots, key_size))
        self.value_bias = nn.Parameter(torch.zeros(layers, 1, slots, value_size))
        self.key_scale: nn.Parameter | None = None
        if config.key_norm:
            self.key_scale = nn.Parameter(torch.ones(layers, config.kv_head_dim))

    def forward(self, gists: Tensor, levels: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """Reads gists as keys and values.

        Args:
            gists: ``[n, gist_width]``.
            levels: int64 ``[n]``, 1 for a gist of tokens.
            slots: how many of a gist's entries to read, the first ones.

        Returns:
            Keys ``[kv_layers, n, slots, kv_heads, kv_head_dim]`` and values
            ``[kv_layers, n, slots, kv_heads, kv_value_dim]``.
        """
        config = self.config
        told = levels.clamp(max=config.told_levels or config.max_levels)
        x = self.norm(gists) + self.levels(told)
        if self.mlp is not None:
            x = self.mlp(x)
        key_map, value_map = self.key_map, self.value_map
        equation = "ng,lsgo->lnso"
        if self.down is not None:
            x = torch.einsum("ng,sgr->nsr", x, self.down[:slots])
            equation = "nsr,lro->lnso"
        else:
            key_map, value_map = key_map[:, :slots], value_map[:, :slots]
        keys = torch.einsum(equation, x, key_map) + self.key_bias[:, :, :slots]
        values = torch.einsum(equation, x, value_map) + self.value_bias[:, :, :slots]
        keys = keys.unflatten(-1, (config.kv_heads, config.kv_head_dim))
        values = values.unflatten(-1, (config.kv_heads, config.kv_value_dim))
        if self.key_scale is not None:
            keys = F.rms_norm(keys, (config.kv_head_dim,), eps=1e-6)
            keys = keys * self.key_scale[:, None, None, None]
        return keys, values
