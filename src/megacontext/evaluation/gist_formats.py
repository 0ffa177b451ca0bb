"""What a memory's number format costs: the same windows read with gists of several formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megacontext.evaluation.substitution import HORIZON, Substitution, tail_log_probs
from megacontext.gistnet import GistNet
from megacontext.memory.identity import GistDtype
from megacontext.memory.number_formats import as_stored
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.gist_features import GistFeatures
from megacontext.runtime.history_buffers import HistoryBuffers
from megacontext.runtime.window_batch import window_states
from megacontext.runtime.window_layout import WindowLayout


@torch.inference_mode()
def nll_by_format(
    base: BaseModel,
    gistnet: GistNet,
    ids: Tensor,
    substitution: Substitution,
    formats: Sequence[GistDtype] = ("fp16", "int8"),
    *,
    batch: int = 8,
) -> dict[GistDtype, Tensor]:
    """NLL of the tokens behind each window's context, once for every format.

    Gists are what a memory of that format gives back, those of level 2 made from children as they
    are stored. Nothing else differs.

    Args:
        base: the frozen base model.
        gistnet: makes and reads the gists.
        ids: int64 ``[windows, tokens]``, see :meth:`Substitution.tokens`.
        substitution: what becomes a gist.
        formats: number formats of the gists.
        batch: windows per forward.

    Returns:
        By format, float32 ``[windows, HORIZON]`` nats.
    """
    size = gistnet.config.block_size
    context = len(substitution.levels) * size
    tail = ids.shape[1] // size - len(substitution.levels)
    found: dict[GistDtype, list[Tensor]] = {dtype: [] for dtype in formats}
    for chunk in ids.to(base.device).split(batch):
        levels = torch.tensor([*substitution.levels, *[0] * tail], device=chunk.device)
        shape = WindowLayout.of(levels.expand(len(chunk), -1), block_size=size, slots=gistnet.cost)
        embeddings = base.embed(chunk)
        features = GistFeatures(base, gistnet.config).over(embeddings)
        made = HistoryBuffers.encode(gistnet, embeddings, features=features)
        targets = chunk[:, context + 1 : context + 1 + HORIZON, None]
        for dtype, parts in found.items():
            buffers = _stored(gistnet, made, dtype, deep=2 in substitution.levels)
            log_probs = tail_log_probs(base, window_states(base, gistnet, buffers, shape), size)
            parts.append(-log_probs.gather(-1, targets)[..., 0].cpu())
    return {dtype: torch.cat(parts) for dtype, parts in found.items()}


def _stored(
    gistnet: GistNet, made: HistoryBuffers, dtype: GistDtype, *, deep: bool
) -> HistoryBuffers:
    """The buffers as a memory gives them back, with level 2 where it is read."""

    def read_back(vectors: Tensor) -> Tensor:
        return as_stored(vectors.flatten(0, 1), dtype).float().unflatten(0, vectors.shape[:2])

    gists, fidelity, size = [read_back(made.gists)], [made.fidelity], made.block_size
    spans = made.n_blocks // size
    if deep and spans:
        children = gists[0][:, : spans * size].unflatten(1, (spans, size))
        above = gistnet.encode_streams(children, 2)
        gists.append(read_back(above.vectors))
        fidelity.append(above.fidelity)
    return replace(
        made,
        gists=torch.cat(gists, 1),
        fidelity=torch.cat(fidelity, 1),
        levels=2 if deep else made.levels,
    )
