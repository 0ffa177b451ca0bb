"""What ``--model_args`` of lm-evaluation-harness may say about MegaContext."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from pydantic import Field

from megacontext.errors import ConfigError
from megacontext.runtime.engine import EngineConfig
from megacontext.runtime.session import SessionConfig


class LmEvalConfig(SessionConfig):
    """A session that answers the harness's requests.

    Attributes:
        stride: tokens scored between two moves of the focus, where a text exceeds the budget.
        max_gen_toks: most tokens of an answer, where the task does not say.
        add_bos_token: begin every context with the tokenizer's first token, as some models expect.
        prefix_token_id: what precedes a text that is scored from its first token on; by default
            the tokenizer's first or, without one, its last token.
        look_again: text behind which the focus looks again while an answer is written; empty: after
            every block only.
        strip_notes: leave out the notes that a model writes before its answer.
        seed: of answers that are sampled.
    """

    stride: int = Field(default=32, ge=1)
    max_gen_toks: int = Field(default=256, ge=1)
    add_bos_token: bool = False
    prefix_token_id: int | None = Field(default=None, ge=0)
    look_again: str = "."
    strip_notes: bool = False
    seed: int = 0

    @classmethod
    def from_model_args(cls, arguments: Mapping[str, Any]) -> Self:
        """Reads flat arguments: keys of :class:`EngineConfig` need no ``engine.`` before them.

        ``pretrained`` is another name of ``model``. The harness's own ``batch_size`` and
        ``max_batch_size`` are left out, since requests are run one by one.

        Raises:
            ConfigError: a key is unknown or named twice, or its value is not allowed.
        """
        values = dict(arguments)
        for ignored in ("batch_size", "max_batch_size"):
            values.pop(ignored, None)
        if "pretrained" in values:
            if "model" in values:
                raise ConfigError("model_args: model and pretrained are the same; give one of them")
            values["model"] = values.pop("pretrained")
        engine = dict(values.pop("engine", None) or {})
        for name in EngineConfig.model_fields.keys() & values.keys():
            if name in engine:
                raise ConfigError(f"model_args: {name} is given twice; leave out engine.{name}")
            engine[name] = values.pop(name)
        values["engine"] = engine
        device = str(values.get("device") or "cpu")
        # Whoever runs the harness without --device gets cuda:0, with or without such a device.
        has_none = device.startswith("cuda") and not torch.cuda.is_available()
        values["device"] = "cpu" if has_none else device
        return cls.parse(values, where="model_args")
