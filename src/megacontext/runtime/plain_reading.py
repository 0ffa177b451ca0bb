"""Short texts read by themselves: hidden states and likelihood of each, in one forward."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from megacontext.runtime import kv_cache

if TYPE_CHECKING:
    from megacontext.runtime.base_model import BaseModel


@dataclass(frozen=True, eq=False)
class PlainReading:
    """One text as the base model reads it with nothing before it.

    Attributes:
        hidden: ``[n, d_model]`` final hidden states in the model's dtype.
        nll: ``[n - 1]`` float32, nats of every token but the first.
    """

    hidden: Tensor
    nll: Tensor


def read_plain(base: BaseModel, texts: Sequence[Tensor]) -> list[PlainReading]:
    """Reads texts in one forward.

    Args:
        base: the frozen base model.
        texts: at least one, each ``[n]`` int64 with at least one token; of similar length, since
            the shorter ones are padded.
    """
    # What stands behind a text is never seen by it: padding on the right needs no mask.
    ids = pad_sequence([text.to(base.device) for text in texts], batch_first=True)
    positions = torch.arange(ids.shape[1], device=base.device).expand(len(ids), -1)
    embeddings, entries = base.embed(ids), kv_cache.empty_cache(base.device).entries
    with torch.inference_mode(), final_states(base.model) as caught:
        logits = base.forward_rows(embeddings, positions, entries, None, None).logits
        nll = F.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none")
    # Outside of inference mode copies are ordinary tensors, usable in training.
    return [
        PlainReading(hidden[: len(text)].clone(), row[: len(text) - 1].clone())
        for text, hidden, row in zip(texts, caught[0], nll, strict=True)
    ]


@contextmanager
def final_states(model: Any) -> Generator[list[Tensor]]:
    """The decoder's final hidden states ``[batch, rows, d_model]`` of every forward meanwhile."""
    caught: list[Tensor] = []

    def catch(_module: Any, _inputs: Any, output: Any) -> None:
        caught.append(output.last_hidden_state)

    hook = model.get_decoder().register_forward_hook(catch)
    try:
        yield caught
    finally:
        hook.remove()
