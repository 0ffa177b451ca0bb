"""One forward of the base model over a batch of equally shaped windows, with gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megacontext.gistnet import GistNet
from megacontext.runtime import kv_cache
from megacontext.runtime.history_buffers import HistoryBuffers
from megacontext.runtime.window_layout import WindowLayout

if TYPE_CHECKING:
    from megacontext.runtime.base_model import BaseModel

Decoder = Callable[..., Any]


def window_states(
    base: BaseModel,
    gistnet: GistNet,
    buffers: HistoryBuffers,
    layout: WindowLayout,
    *,
    decoder: Decoder | None = None,
) -> Tensor:
    """Final hidden states of the raw rows of every window.

    Args:
        base: the frozen base model.
        gistnet: its reader reads the gists; gradients flow to it and to the gists.
        buffers: texts and their gists.
        layout: which of them are raw and which gists.
        decoder: the base's decoder, if it was compiled.

    Returns:
        ``[batch, raw, d_model]``; the model's head turns them into logits.
    """
    decoder = _decoder_of(base, decoder)
    rows = _gather(buffers.embeddings, layout.tokens)
    if not layout.n_gists:
        return plain_states(base, rows, layout.positions, decoder=decoder)
    gists = _gather(buffers.gists, layout.gists).flatten(0, 1)
    levels = layout.gist_levels.flatten()
    if gistnet.config.reader == "kv":
        keys, values = gistnet.read_kv(gists, levels, layout.slots)
        return _behind_gists(base, rows, keys, values, layout, decoder)
    return _among_gists(
        base, rows, gistnet.read_embeddings(gists, levels, layout.slots), layout, decoder
    )


def plain_states(
    base: BaseModel, rows: Tensor, positions: Tensor, *, decoder: Decoder | None = None
) -> Tensor:
    """Final hidden states ``[batch, n, d_model]`` of raw rows alone.

    Args:
        base: the frozen base model.
        rows: ``[batch, n, d_model]`` input embeddings.
        positions: int64 ``[batch, n]``.
        decoder: the base's decoder, if it was compiled.
    """
    decoder = _decoder_of(base, decoder)
    output = decoder(inputs_embeds=rows.to(base.dtype), position_ids=positions, use_cache=False)
    return output.last_hidden_state


def _decoder_of(base: BaseModel, compiled: Decoder | None) -> Decoder:
    return base.model.get_decoder() if compiled is None else compiled


def _behind_gists(
    base: BaseModel,
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    layout: WindowLayout,
    decoder: Decoder,
) -> Tensor:
    """Gists as keys and values: they stand in the cache before all rows, masked by position."""
    batch = len(rows)
    positions = layout.gist_positions
    last = int(max(positions.max(), layout.positions.max()))
    rotated = base.rotation.rotate(
        keys.flatten(1, 2).to(base.dtype), positions.flatten(), last_position=last
    )
    rotated = rotated.unflatten(1, (batch, -1))
    values = values.flatten(1, 2).to(base.dtype).unflatten(1, (batch, -1))
    entries = kv_cache.new_entries()
    for layer in range(base.n_layers):
        entries.update(rotated[layer].transpose(1, 2), values[layer].transpose(1, 2), layer)
    mask = kv_cache.attention_mask(
        base.architecture,
        gist_positions=positions,
        positions=layout.positions,
        n_queries=rows.shape[1],
        dtype=base.dtype,
    )
    output = decoder(
        inputs_embeds=rows.to(base.dtype),
        position_ids=layout.positions,
        past_key_values=entries,
        attention_mask=mask,
        use_cache=True,
    )
    return output.last_hidden_state


def _among_gists(
    base: BaseModel, rows: Tensor, read: Tensor, layout: WindowLayout, decoder: Decoder
) -> Tensor:
    """Gists as input embeddings: rows among the raw ones, in the order of their positions."""
    entries = read.flatten(0, 1).unflatten(0, (len(rows), -1)).to(rows)
    positions = torch.cat((layout.positions, layout.gist_positions), dim=1)
    order = positions.argsort(dim=1)
    joined = _gather(torch.cat((rows, entries), dim=1), order)
    states = plain_states(base, joined, positions.gather(1, order), decoder=decoder)
    return _gather(states, order.argsort(dim=1)[:, : rows.shape[1]])


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """``x [batch, n, width]`` at ``index [batch, m]``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
