"""How much attention the newest rows of a context pay to each of its entries."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megacontext.runtime.architectures import attention_modules
from megacontext.runtime.context_input import ContextInput

if TYPE_CHECKING:
    from megacontext.runtime.base_model import BaseModel


def mean_attention(base: BaseModel, context: ContextInput, query_rows: int) -> Tensor:
    """See :meth:`BaseModel.attention_to`; ``[gists + rows]`` float32.

    Only the asking rows run with explicit attention weights, so memory grows with
    ``query_rows × entries``, not with the square of the entries.
    """
    first = context.n_rows - query_rows
    cache = base.gist_entries(context)
    if first:
        older = ContextInput(
            context.embeddings[:first],
            context.positions[:first],
            context.gist_keys,
            context.gist_values,
            context.gist_positions,
        )
        cache = base.prefill(older, cache, keep=1).cache
    mass = torch.zeros(len(context), dtype=torch.float32, device=base.device)
    with _eager_attention(base.model), _weights_added_to(mass, base):
        base.prefill(context, cache, keep=1)
    return mass / base.n_layers


@contextmanager
def _eager_attention(model: Any) -> Generator[None]:
    """Runs the model with the attention implementation that returns its weights."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def _weights_added_to(mass: Tensor, base: BaseModel) -> Generator[None]:
    def add(_module: Any, _inputs: Any, output: tuple[Any, ...]) -> None:
        # [1, heads, query_rows, entries]
        mass.add_(output[1][0].float().mean(dim=(0, 1)))

    modules = attention_modules(base.model, base.n_layers, base.name)
    hooks = [module.register_forward_hook(add) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
