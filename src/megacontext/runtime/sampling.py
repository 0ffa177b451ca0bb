"""Choosing the next token as the model's own generation settings say."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megacontext.config import FrozenConfig
from megacontext.errors import ConfigError, InputError, ModelError

_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")


class SamplingConfig(FrozenConfig):
    """How the next token is chosen; the names are those of transformers' GenerationConfig.

    Attributes:
        do_sample: draw from the distribution; otherwise take its maximum.
        temperature: divides the logits.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the likeliest tokens that together reach this probability.
        min_p: drop tokens less likely than this share of the likeliest one.
        repetition_penalty: above 1 makes tokens of the context less likely.
        eos_token_id: tokens that end the text.
    """

    do_sample: bool = False
    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    eos_token_id: tuple[int, ...] = ()


class TokenSampler:
    """Next-token choice: deterministic for a seed, whatever the device.

    Args:
        generation_config: the model's ``GenerationConfig``; settings it leaves out are neutral.
        seed: of this sampler's own random numbers.
        overrides: values of :class:`SamplingConfig` that replace the model's.

    Raises:
        ConfigError: an override is unknown or outside its range, or it shapes a distribution
            that is never drawn from because ``do_sample`` is false.
    """

    def __init__(self, generation_config: Any, seed: int = 0, **overrides: Any) -> None:
        values = {
            name: value
            for name in SamplingConfig.model_fields
            if (value := getattr(generation_config, name, None)) is not None
        }
        values |= overrides
        values["eos_token_id"] = _as_ids(values.get("eos_token_id"))
        self.config = SamplingConfig.parse(values, where="sampling")
        self.eos_ids = frozenset(self.config.eos_token_id)
        idle = sorted(set(overrides) & set(_SAMPLING_ONLY))
        if idle and not self.config.do_sample:
            raise ConfigError(
                f"sampling: {', '.join(idle)} has no effect while do_sample is false; set "
                "do_sample=true as well"
            )
        self._processors = _processors(self.config)
        self._random = torch.Generator().manual_seed(seed)

    def choose(self, logits: Tensor, context_ids: Tensor) -> int:
        """The next token.

        Args:
            logits: ``[vocab]``, of the last row.
            context_ids: ``[n]`` int64; the tokens that a repetition penalty counts as said.

        Raises:
            InputError: the logits are no single row.
            ModelError: the logits are not numbers.
        """
        if logits.ndim != 1:
            raise InputError(f"logits must be one row [vocab], got {list(logits.shape)}")
        # On the CPU in float32, so that a seed means the same on every device.
        scores = logits.detach().to("cpu", torch.float32)[None]
        if bool(scores.isnan().any() | (scores == torch.inf).any()):
            raise ModelError("the base model's logits are not finite; try dtype=float32")
        scores = self._processors(context_ids.to("cpu", torch.int64)[None], scores)
        if not self.config.do_sample:
            return int(scores[0].argmax())
        probabilities = torch.softmax(scores[0], dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self._random))

    def is_end(self, token: int) -> bool:
        """Whether a token ends the text."""
        return token in self.eos_ids


def _processors(config: SamplingConfig) -> Any:
    """The library's own processors, in the order in which ``generate`` applies them."""
    processors: Any = LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if not config.do_sample:
        return processors
    if config.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        processors.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        processors.append(MinPLogitsWarper(config.min_p))
    return processors


def _as_ids(value: Any) -> Any:
    if value is None:
        return ()
    return value if isinstance(value, list | tuple) else (value,)  # pyright: ignore[reportUnknownVariableType]
