"""Streams a continuation of a prompt by the base model alone: the first trial of a model."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from megacontext.config import FrozenConfig
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.plain_decode import decode_plain, raw_context
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
    engines = ("max_new_tokens", "stop", "look_again", "seed")
    overrides = {k: v for k, v in options.items() if k not in engines}
    sampler = TokenSampler(base.generation_config, config.decode.seed, **overrides)
    ids = base.encode(config.prompt)
    read = base.prefill(raw_context(base, ids), keep=1)
    first = read.logits[-1]
    texts: list[str] = []
    started = time.perf_counter()
    write(config.prompt)
    for token in decode_plain(base, read, ids, sampler, max_new_tokens=limit, stop=stop):
        write(token.text)
        texts.append(token.text)
    seconds = time.perf_counter() - started
    return {
        "model": base.name,
        "text": "".join(texts),
        "tokens": len(texts),
        "tokens_per_s": len(texts) / seconds,
        "logits": list(first.shape),
        "finite": bool(first.isfinite().all()),
    }
