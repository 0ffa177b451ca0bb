"""Layers of GistNet: windowed self-attention, slot queries, residual MLP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rotate(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv 2104.09864), halves convention.

    Args:
        x: ``[..., time, head_dim]``, ``head_dim`` even.
        positions: ``[time]``, may be negative; only differences matter to attention.
        theta: base of the frequencies.

    Returns:
        ``x`` rotated, same shape and type.
    """
    half = x.shape[-1] // 2
    steps = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angles = positions.to(torch.float32)[:, None] * theta**-steps
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class ResidualMLP(nn.Module):
    """``x + SwiGLU(RMSNorm(x))`` (SwiGLU: arXiv 2002.05202).

    Args:
        width: size of the last dimension.
        d_ff: inner width.
        zero_init: start as the identity.
    """

    def __init__(self, width: int, d_ff: int, *, zero_init: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, width, bias=False)
        if zero_init:
            nn.init.zeros_(self.down.weight)

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Tensor:
        """Maps ``[..., width]`` to the same shape; ``shift`` is added to what the MLP reads."""
        normed = self.norm(x)
        if shift is not None:
            normed = normed + shift
        gate, value = self.up(normed).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * value)


class WindowAttention(nn.Module):
    """Self-attention of each block over itself and the ``window`` blocks before it.

    Inside the window attention runs both ways, since a block is only encoded once it is whole;
    nothing after the block is ever seen. Queries and keys are RMS-normalised per head (QK-norm,
    arXiv 2010.04245) and rotated by their position relative to the block, so that a block's result
    does not depend on where in a stream it was computed.
    """

    def __init__(self, width: int, n_heads: int, theta: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.theta = theta
        head_dim = width // n_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, valid: Tensor | None, window: int, n_out: int) -> Tensor:
        """Attends from the last ``n_out`` blocks.

        Args:
            x: ``[streams, blocks, block_size, width]``.
            valid: bool ``[streams, blocks, block_size]``, False where nothing may be read;
                ``None``: everything is valid.
            window: blocks before its own that a block reads; those before the first are absent.
            n_out: trailing blocks to compute, at most ``blocks``.

        Returns:
            ``[streams, n_out, block_size, width]``.
        """
        streams, blocks, size, width = x.shape
        window = min(window, blocks - 1)
        missing = max(0, window - (blocks - n_out))
        first = blocks - n_out - window + missing
        heads = (self.n_heads, width // self.n_heads)
        query = self.query_norm(self.query(x[:, blocks - n_out :]).unflatten(-1, heads))
        key, value = self.key_value(x[:, first:]).chunk(2, dim=-1)
        key = self.key_norm(key.unflatten(-1, heads))
        key = _windows(key, window, missing)
        value = _windows(value.unflatten(-1, heads), window, missing)
        query = query.transpose(2, 3).flatten(0, 1)
        offsets = torch.arange(-window * size, size, device=x.device)
        attended = F.scaled_dot_product_attention(
            rotate(query, offsets[-size:], self.theta),
            rotate(key, offsets, self.theta),
            value,
            attn_mask=_window_mask(x, valid, window, missing, n_out),
        )
        return self.out(attended.transpose(1, 2).reshape(streams, n_out, size, width))


def _windows(x: Tensor, window: int, missing: int) -> Tensor:
    """``[streams, blocks, size, heads, dim]`` to ``[streams * out, heads, (1+window)*size, dim]``.

    ``missing`` blocks of zeros stand in front for what lies before the first block.
    """
    if missing:
        x = F.pad(x, (0, 0, 0, 0, 0, 0, missing, 0))
    if not window:
        return x.transpose(2, 3).flatten(0, 1)
    spans = x.unfold(1, window + 1, 1)
    return spans.permute(0, 1, 3, 5, 2, 4).flatten(3, 4).flatten(0, 1)


def _window_mask(
    x: Tensor, valid: Tensor | None, window: int, missing: int, n_out: int
) -> Tensor | None:
    """Bool ``[streams * n_out, 1, size, (1+window)*size]``, True where attention is allowed."""
    if valid is None and not missing:
        return None
    streams, blocks, size, _ = x.shape
    if valid is None:
        valid = torch.ones(streams, blocks, size, dtype=torch.bool, device=x.device)
    first = blocks - n_out - window + missing
    readable = F.pad(valid[:, first:], (0, 0, missing, 0))
    readable = readable.unfold(1, window + 1, 1).transpose(2, 3).flatten(2, 3).flatten(0, 1)
    # An unreadable position reads itself: a softmax over nothing would be NaN.
    itself = torch.eye(size, dtype=torch.bool, device=x.device)
    itself = F.pad(itself, (window * size, 0))
    return (readable[:, None, :] | itself)[:, None]


class EncoderLayer(nn.Module):
    """Pre-norm :class:`WindowAttention` and :class:`ResidualMLP`."""

    def __init__(self, width: int, n_heads: int, d_ff: int, theta: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.attention = WindowAttention(width, n_heads, theta)
        self.mlp = ResidualMLP(width, d_ff)

    def forward(self, x: Tensor, valid: Tensor | None, window: int, n_out: int) -> Tensor:
        """As :meth:`WindowAttention.forward`, with residuals."""
        kept = x[:, x.shape[1] - n_out :]
        return self.mlp(kept + self.attention(self.norm(x), valid, window, n_out))


class SlotQueries(nn.Module):
    """Learned queries, shared by all blocks and levels, that cross-attend to a block's states.

    One query gives one vector of ``width`` numbers (as in Perceiver, arXiv 2103.03206).
    """

    def __init__(self, width: int, n_heads: int, n_queries: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        head_dim = width // n_heads
        self.queries = nn.Parameter(torch.randn(n_queries, width) * width**-0.5)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """Pools ``[n, block_size, width]`` into ``[n, n_queries, width]``."""
        n, _, width = states.shape
        heads = (self.n_heads, width // self.n_heads)
        key, value = self.key_value(states).unflatten(-1, (2, *heads)).unbind(-3)
        query = self.query_norm(self.queries.unflatten(-1, heads)).transpose(0, 1)
        attended = F.scaled_dot_product_attention(
            query.expand(n, -1, -1, -1), self.key_norm(key).transpose(1, 2), value.transpose(1, 2)
        )
        return self.queries + self.out(attended.transpose(1, 2).flatten(2, 3))
