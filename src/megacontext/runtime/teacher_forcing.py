"""Teacher-forced NLL of what follows a context, batched over contexts of different lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megacontext.errors import InputError
from megacontext.runtime import kv_cache
from megacontext.runtime.context_input import ContextInput

if TYPE_CHECKING:
    from megacontext.runtime.base_model import BaseModel


def target_nll(
    base: BaseModel,
    contexts: Sequence[ContextInput],
    target_ids: Tensor,
    target_positions: Tensor | None = None,
) -> Tensor:
    """See :meth:`BaseModel.nll_batch`; ``[batch, h]`` float32, in nats."""
    logits = target_logits(base, contexts, target_ids, target_positions)
    likelihood = torch.log_softmax(logits.float(), dim=-1)
    return -likelihood.gather(-1, target_ids.to(base.device)[..., None])[..., 0]


def target_logits(
    base: BaseModel,
    contexts: Sequence[ContextInput],
    target_ids: Tensor,
    target_positions: Tensor | None = None,
) -> Tensor:
    """Logits from which each target is predicted, with the targets before it read.

    Gradients flow to the contexts' embeddings, gist keys and gist values unless disabled outside;
    arguments and errors are those of :meth:`BaseModel.nll_batch`.

    Returns:
        ``[batch, h, vocab]`` in the model's dtype.
    """
    target_ids = target_ids.to(base.device)
    positions = _target_positions(contexts, target_ids, target_positions)
    # The last target is predicted, never read.
    read = base.embed(target_ids[:, :-1])
    rows = [
        torch.cat([context.embeddings.to(read), read[index]])
        for index, context in enumerate(contexts)
    ]
    row_positions = [
        torch.cat([context.positions.to(base.device), positions[index, :-1]])
        for index, context in enumerate(contexts)
    ]
    return _last_logits(base, contexts, rows, row_positions, keep=target_ids.shape[1])


def _target_positions(
    contexts: Sequence[ContextInput], target_ids: Tensor, given: Tensor | None
) -> Tensor:
    if target_ids.ndim != 2 or target_ids.shape[0] != len(contexts) or target_ids.numel() == 0:
        raise InputError(
            f"{len(contexts)} contexts need targets [{len(contexts)}, h] with h ≥ 1, got "
            f"{list(target_ids.shape)}"
        )
    if any(context.n_rows == 0 for context in contexts):
        raise InputError("a context without rows predicts nothing; keep at least one raw token")
    if given is None:
        last = torch.stack([context.positions[-1] for context in contexts]).to(target_ids.device)
        return last[:, None] + 1 + torch.arange(target_ids.shape[1], device=target_ids.device)
    if given.shape != target_ids.shape or given.dtype != torch.int64:
        raise InputError(
            f"target positions must be int64 {list(target_ids.shape)}, got {list(given.shape)}"
        )
    return given.to(target_ids.device)


def _last_logits(
    base: BaseModel,
    contexts: Sequence[ContextInput],
    rows: list[Tensor],
    row_positions: list[Tensor],
    keep: int,
) -> Tensor:
    """Logits ``[batch, keep, vocab]`` of the last rows of each sequence."""
    if len(rows) == 1:
        cache = base.gist_entries(contexts[0])
        cache.positions = row_positions[0]
        mask = base.mask_for(cache, len(row_positions[0]))
        output = base.forward_rows(rows[0][None], row_positions[0][None], cache.entries, mask, keep)
        return output.logits
    # Padding on the left aligns the rows whose logits are wanted at the end.
    embeddings = pad_sequence(rows, batch_first=True, padding_side="left")
    positions = pad_sequence(row_positions, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(row) for row in rows], device=base.device)
    n = positions.shape[1]
    row_valid = torch.arange(n, device=base.device) >= n - lengths[:, None]
    entries, gist_positions, gist_valid = _padded_gists(base, contexts)
    if _is_plain(base, gist_positions, row_valid):
        return base.forward_rows(embeddings, positions, entries, None, keep).logits
    mask = kv_cache.attention_mask(
        base.architecture,
        gist_positions=gist_positions,
        positions=positions,
        n_queries=n,
        dtype=base.dtype,
        gist_valid=gist_valid,
        row_valid=row_valid,
    )
    return base.forward_rows(embeddings, positions, entries, mask, keep).logits


def _is_plain(base: BaseModel, gist_positions: Tensor, row_valid: Tensor) -> bool:
    """Whether the model's own causal mask is right, which is faster and needs less memory."""
    if gist_positions.shape[1] or base.architecture.has_sliding_layers:
        return False
    return bool(row_valid.all())


def _padded_gists(base: BaseModel, contexts: Sequence[ContextInput]) -> tuple[Any, Tensor, Tensor]:
    """One cache with the gists of every context, padded at the end."""
    each = [base.gist_entries(context) for context in contexts]
    positions = pad_sequence([cache.gist_positions for cache in each], batch_first=True)
    counts = torch.tensor([cache.n_gists for cache in each], device=base.device)
    n_gists = positions.shape[1]
    valid = torch.arange(n_gists, device=base.device) < counts[:, None]
    entries = kv_cache.new_entries()
    if n_gists == 0:
        return entries, positions, valid
    shape = (len(each), base.n_layers, base.n_kv_heads, n_gists)
    keys = torch.zeros((*shape, base.head_dim), dtype=base.dtype, device=base.device)
    values = torch.zeros((*shape, base.value_dim), dtype=base.dtype, device=base.device)
    for index, cache in enumerate(each):
        for layer, (own_keys, own_values) in enumerate(kv_cache.layer_entries(cache.entries)):
            keys[index, layer, :, : cache.n_gists] = own_keys[0]
            values[index, layer, :, : cache.n_gists] = own_values[0]
    for layer in range(base.n_layers):
        entries.update(keys[:, layer], values[:, layer], layer)
    return entries, positions, valid
