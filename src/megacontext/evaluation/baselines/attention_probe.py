"""The queries and keys with which a base model attends, of whatever architecture."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megacontext.errors import InputError
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.plain_decode import raw_context

_PROBED = "sdpa"


@torch.inference_mode()
def queries_and_keys(base: BaseModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Reads raw tokens and gives what every layer's attention compares, positions taken out.

    Args:
        base: the model.
        ids: int64 ``[n]``, 1 or more.

    Returns:
        Queries ``[layers, n, heads, head_dim]``, times the scale of their products with keys, and
        keys ``[layers, n, kv_heads, head_dim]``, both as they are just before the rotary embedding,
        in the model's dtype.

    Raises:
        InputError: there are no tokens.
        ModelError: positions of this architecture cannot be taken out.
    """
    if not len(ids):
        raise InputError("there are no tokens whose attention could be looked at")
    with _recorded(base) as seen:
        base.prefill(raw_context(base, ids), keep=1)
    positions = torch.arange(len(ids), device=base.device)
    queries, keys = (
        torch.stack([seen[layer][part].transpose(0, 1) for layer in range(base.n_layers)])
        for part in (0, 1)
    )
    rotation = base.rotation
    return rotation.unrotate(queries, positions), rotation.unrotate(keys, positions)


@contextmanager
def _recorded(base: BaseModel) -> Generator[dict[int, tuple[Tensor, Tensor]]]:
    """Per layer, queries and keys ``[heads, n, head_dim]`` of what is read inside."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    plain = ALL_ATTENTION_FUNCTIONS[_PROBED]
    before = base.model.config._attn_implementation

    def record(module: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        seen[module.layer_idx] = (query[0] * scale, key[0])
        return plain(module, query, key, *rest, **options)

    try:
        ALL_ATTENTION_FUNCTIONS[_PROBED] = record
        if before != _PROBED:
            base.model.set_attn_implementation(_PROBED)
        yield seen
    finally:
        ALL_ATTENTION_FUNCTIONS[_PROBED] = plain
        if before != _PROBED:
            base.model.set_attn_implementation(before)
