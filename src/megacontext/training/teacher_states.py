"""Hidden states of the frozen base model over a slice: what a student is measured against."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from megacontext.config import FrozenConfig
from megacontext.errors import ConfigError, DataError
from megacontext.runtime.base_model import BaseModel

_SAMPLED_VALUES = 65_536


class TeacherConfig(FrozenConfig):
    """What of the base model's forward is kept.

    Attributes:
        enabled: whether anything is.
        layers: which hidden states: 0 the input embeddings, ``l`` what layer ``l`` gives, ``-1``
            the final ones, after the last norm, from which the head makes logits.
        horizon: keep those over the future tokens as well, so that the NLL of the full context
            follows from the data set and the head alone.
        dtype: of the stored states.
    """

    enabled: bool = True
    layers: tuple[int, ...] = Field(default=(-1,), min_length=1)
    horizon: bool = True
    dtype: Literal["float16", "float32"] = "float16"


class Teacher:
    """Computes the hidden states that a data set keeps.

    Args:
        base: the frozen model.
        config: which states.
        longest: most tokens it will be given.

    Attributes:
        layers: the states' numbers, ``0 … n_layers``, in the order of the configuration.

    Raises:
        ConfigError: a layer does not exist or comes twice, or the model has too few positions.
    """

    def __init__(self, base: BaseModel, config: TeacherConfig, longest: int) -> None:
        if longest > base.max_positions:
            raise ConfigError(
                f"{base.name} has {base.max_positions} positions, the teacher would read {longest} "
                "tokens; lower `slices.context_tokens`, or set `teacher.enabled` to false"
            )
        self.base = base
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.layers = _layer_numbers(config.layers, base)

    def states(self, ids: Tensor) -> Tensor:
        """States over tokens.

        Args:
            ids: ``[n]`` int64.

        Returns:
            ``[layers, n, d_model]`` on the CPU.

        Raises:
            DataError: a state is not finite in the dtype they are stored in.
        """
        if self.layers == (self.base.n_layers,):
            stack = self.base.features(ids)[None]
        else:
            stack = self._stack(ids)
        stored = stack.to("cpu", self.dtype)
        if not bool(torch.isfinite(stored).all()):
            raise DataError(
                f"{self.base.name}: a teacher state is not finite in {self.dtype}; set "
                "`teacher.dtype` to float32 or leave out the layer in `teacher.layers`"
            )
        return stored

    @torch.inference_mode()
    def _stack(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[0], device=self.base.device)
        output: Any = self.base.model.get_decoder()(
            inputs_embeds=self.base.embed(ids)[None],
            position_ids=positions[None],
            use_cache=False,
            output_hidden_states=True,
        )
        # Not every architecture puts the last norm on the last of its hidden states.
        states = [*output.hidden_states[:-1], output.last_hidden_state]
        return torch.stack([states[layer][0] for layer in self.layers]).clone()


def weights_fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits that tell one set of weights from another, wherever it lies.

    Hashes names, shapes and up to 65,536 values of every parameter, rounded to bfloat16, so that a
    model loaded in another dtype keeps its fingerprint.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        values = parameter.detach().flatten()
        # An odd step meets every column of a matrix whose width is a power of two.
        step = max(1, values.numel() // _SAMPLED_VALUES) | 1
        sample = values[::step].to("cpu", torch.bfloat16).contiguous()
        digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _layer_numbers(layers: tuple[int, ...], base: BaseModel) -> tuple[int, ...]:
    last = base.n_layers
    for layer in layers:
        if not -last - 1 <= layer <= last:
            raise ConfigError(
                f"`teacher.layers` has {layer}; {base.name} has hidden states 0…{last} (-1 is the "
                "last)"
            )
    numbers = tuple(layer % (last + 1) for layer in layers)
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"`teacher.layers` names a layer twice: {list(layers)}; name each once")
    return numbers
