"""What the base model reads: one mixed sequence of raw tokens and gists."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext.errors import InputError


@dataclass(frozen=True, eq=False)
class ContextInput:
    """One sequence of raw tokens and gists, oldest first.

    Raw tokens, and gists which are read as input embeddings, are *rows*: the base model computes
    their keys and values. Gists which are read through the ``kv`` reader bring keys and values
    along; they cost no forward pass and see nothing of what precedes them.

    Args:
        embeddings: ``[rows, d_model]``, floating point; input embeddings of the rows.
        positions: ``[rows]`` int64, not negative, not decreasing; the rows' positions.
        gist_keys: ``[layers, gists, kv_heads, head_dim]``; keys of the ``kv`` gists as they are
            just before the base's rotary embedding (so *after* its key norm, where it has one).
        gist_values: ``[layers, gists, kv_heads, value_dim]``; their values.
        gist_positions: ``[gists]`` int64, not negative, not decreasing. A row at position p sees
            the gists at positions below p.

    Raises:
        InputError: a shape, dtype or order is not as above, or only some gist fields are given.
    """

    embeddings: Tensor
    positions: Tensor
    gist_keys: Tensor | None = None
    gist_values: Tensor | None = None
    gist_positions: Tensor | None = None

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or not self.embeddings.is_floating_point():
            raise InputError(
                "context embeddings must be floating point [rows, d_model], got "
                f"{_describe(self.embeddings)}"
            )
        _check_positions("positions", self.positions, self.n_rows)
        gist_fields = (self.gist_keys, self.gist_values, self.gist_positions)
        if all(field is None for field in gist_fields):
            return
        if self.gist_keys is None or self.gist_values is None or self.gist_positions is None:
            raise InputError(
                "gist_keys, gist_values and gist_positions belong together: give all or none"
            )
        if self.gist_keys.ndim != 4 or self.gist_values.ndim != 4:
            raise InputError(
                "gist keys and values must be [layers, gists, kv_heads, dim], got "
                f"{_describe(self.gist_keys)} and {_describe(self.gist_values)}"
            )
        if self.gist_keys.shape[:3] != self.gist_values.shape[:3]:
            raise InputError(
                "gist keys and values must agree in layers, gists and kv_heads, got "
                f"{_describe(self.gist_keys)} and {_describe(self.gist_values)}"
            )
        _check_positions("gist_positions", self.gist_positions, self.gist_keys.shape[1])

    @property
    def n_rows(self) -> int:
        """Entries that the base model computes: raw tokens and embedding gists."""
        return self.embeddings.shape[0]

    @property
    def n_gists(self) -> int:
        """Entries that bring their own keys and values."""
        return 0 if self.gist_positions is None else self.gist_positions.shape[0]

    @property
    def gists(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Keys, values and positions of the ``kv`` gists; ``None`` without any."""
        if self.gist_keys is None or self.gist_values is None or self.gist_positions is None:
            return None
        return self.gist_keys, self.gist_values, self.gist_positions

    def __len__(self) -> int:
        return self.n_gists + self.n_rows


def _check_positions(name: str, positions: Tensor, length: int) -> None:
    if positions.shape != (length,) or positions.dtype != torch.int64:
        raise InputError(f"{name} must be int64 [{length}], got {_describe(positions)}")
    if length and bool((positions[:1] < 0).any() | (positions.diff() < 0).any()):
        raise InputError(f"{name} must not be negative and must not decrease (oldest first)")


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
