"""Layers of LensNet: masked cross-attention that is safe on empty inputs, and a residual MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualMLP(nn.Module):
    """``x + SwiGLU(RMSNorm(x))`` on the last dimension."""

    def __init__(self, width: int, d_ff: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[..., width]`` to the same shape."""
        gate, value = self.up(self.norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


class CrossAttention(nn.Module):
    """``x + attention(RMSNorm(x), memory)`` with QK-norm, without positions.

    A learned sink key and value is always readable, so that a query may attend to nothing and an
    empty or fully masked memory is a plain case, not a division by zero.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.heads = (n_heads, width // n_heads)
        self.norm = nn.RMSNorm(width)
        self.memory_norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.query_norm = nn.RMSNorm(self.heads[1])
        self.key_norm = nn.RMSNorm(self.heads[1])
        self.sink = nn.Parameter(torch.zeros(2, *self.heads))
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Attends from ``x [b, n, width]`` to ``memory [b, m, width]`` where ``mask [b, m]``.

        Returns:
            ``[b, n, width]``.
        """
        query = self.query_norm(self.query(self.norm(x)).unflatten(-1, self.heads))
        pairs = self.key_value(self.memory_norm(memory)).unflatten(-1, (2, *self.heads))
        pairs = torch.cat((self.sink.expand(len(x), 1, -1, -1, -1), pairs), dim=1)
        key, value = pairs.unbind(2)
        readable = F.pad(mask, (1, 0), value=True)[:, None, None, :]
        attended = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            self.key_norm(key).transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=readable.expand(-1, -1, x.shape[1], -1),
        )
        return x + self.out(attended.transpose(1, 2).flatten(2))


def blank_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Zeros ``x [b, n, width]`` where ``mask [b, n]`` is False.

    Padding may hold anything, NaN included, and attention weights of 0 do not stop a NaN.
    """
    return x.masked_fill(~mask[..., None], 0.0)
