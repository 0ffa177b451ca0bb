"""Decoding behind a fixed context: no memory, no refocus."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megacontext.runtime.answer import Answer, DecodedToken
from megacontext.runtime.base_model import BaseModel, Prefill
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.sampling import TokenSampler


def decode_plain(
    base: BaseModel,
    read: Prefill,
    prompt: Tensor,
    sampler: TokenSampler,
    *,
    max_new_tokens: int,
    stop: str = "",
) -> Iterator[DecodedToken]:
    """Streams the continuation of a context, token by token.

    Args:
        base: the model.
        read: what it has read, the prompt included; its cache grows by the answer.
        prompt: ``[p]`` int64, the tokens the sampler's penalties count as said before.
        sampler: chooses the tokens.
        max_new_tokens: most tokens.
        stop: text that ends the answer and is not given out.

    Yields:
        The tokens of the answer; their ``round`` is 0.
    """
    logits = read.logits[-1]
    answer = Answer(base, prompt, 0, stop)
    for count in range(max_new_tokens):
        if count:
            position = read.cache.positions[-1:] + 1
            logits = base.step(answer.said[-1:], position, read.cache)[-1]
        token = sampler.choose(logits, answer.said)
        if sampler.is_end(token):
            break
        yield from answer.push(token, 0)
        if answer.stopped:
            return
    yield from answer.finish()


def raw_context(base: BaseModel, ids: Tensor) -> ContextInput:
    """Raw tokens ``[n]`` alone as a context."""
    return ContextInput(base.embed(ids), torch.arange(len(ids), device=base.device))
