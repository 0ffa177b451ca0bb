"""Streams a continuation of a prompt by the base model alone: the first trial of a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from megacontext.config import FrozenConfig
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.sampling import TokenSampler
from megacontext.runtime.session import DecodeConfig


class DecodeDemoConfig(FrozenConfig):
    """One prompt.

    Attributes:
        model: local folder, hub id, or ``bundled:NAME``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: where the model runs.
        prompt: what to continue.
        decode: how.
    """

    model: str = "bundled:tiny"
    dtype: str = "float32"
    device: str = "cpu"
    prompt: str = "Once upon a time"
    decode: DecodeConfig = DecodeConfig(max_new_tokens=48)


def run_decode_demo(config: DecodeDemoConfig, write: Callable[[str], None]) -> dict[str, Any]:
    """Decodes and hands on the text as it comes.

    Args:
        config: model and prompt.
        write: takes each new stretch of text.

    Returns:
        Model, text, tokens per second, and the shape and finiteness of the first logits.
    """
    base = BaseModel.from_pretrained(config.model, dtype=config.dtype, device=config.device)
    options = config.decode.options()
    limit, stop = config.decode.max_new_tokens, config.decode.stop
    overrides = {k: v for k, v in options.items() if k not in ("max_new_tokens", "stop", "seed")}
    sampler = TokenSampler(base.generation_config, config.decode.seed, **overrides)
    ids = base.encode(config.prompt)
    read = base.prefill(ContextInput(base.embed(ids), torch.arange(len(ids))), keep=1)
    logits = first = read.logits[-1]
    answer: list[int] = []
    text = ""
    started = time.perf_counter()
    write(config.prompt)
    while len(answer) < limit:
        token = sampler.choose(logits, torch.cat((ids, torch.tensor(answer, dtype=torch.int64))))
        if sampler.is_end(token):
            break
        answer.append(token)
        whole = base.decode(answer)
        if stop and stop in whole:
            break
        if not whole.endswith("\ufffd"):
            write(whole[len(text) :])
            text = whole
        position = torch.tensor([len(ids) + len(answer) - 1])
        logits = base.step(torch.tensor([token]), position, read.cache)[-1]
    seconds = time.perf_counter() - started
    return {
        "model": base.name,
        "text": text,
        "tokens": len(answer),
        "tokens_per_s": len(answer) / seconds,
        "logits": list(first.shape),
        "finite": bool(first.isfinite().all()),
    }
