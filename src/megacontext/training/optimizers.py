"""Muon for the matrices of a transformer, AdamW for everything else, as one object."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from megacontext.config import FrozenConfig


class OptimizerConfig(FrozenConfig):
    """Learning rates at their peak, warm-up and decay.

    The rate rises linearly over ``warmup_steps``, stays, and falls to zero over the last
    ``decay_share`` of all steps: linearly (Hägele et al., 2024, arXiv 2405.18392) or along a
    cosine. ``matrices`` says what updates the hidden matrices: Muon, or AdamW like all the rest.
    """

    matrices: Literal["muon", "adamw"] = "muon"
    schedule: Literal["linear", "cosine"] = "linear"

    muon_lr: float = Field(default=5e-3, gt=0, allow_inf_nan=False)
    adam_lr: float = Field(default=3e-3, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=50, ge=0)
    decay_share: float = Field(default=0.3, ge=0, le=1)
    clip_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)


class HybridOptimizer:
    """`Muon <https://kellerjordan.github.io/posts/muon/>`_ for hidden matrices, AdamW for the rest.

    Args:
        named_parameters: the trainable parameters.
        config: rates and schedule.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
    ) -> None:
        self.config = config
        self.names: list[list[str]] = [[], []]
        groups: list[list[nn.Parameter]] = [[], []]
        for name, parameter in named_parameters:
            matrix = (
                config.matrices == "muon"
                and parameter.ndim == 2
                and "embed" not in name
                and "lm_head" not in name
            )
            groups[0 if matrix else 1].append(parameter)
            self.names[0 if matrix else 1].append(name)
        self.parameters = [*groups[0], *groups[1]]
        # Muon's own decay goes with the matrices; without Muon they decay in AdamW.
        decay = config.weight_decay if config.matrices == "adamw" else 0.0
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups[1], lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=decay)
        ]
        self.peaks = [config.adam_lr]
        if groups[0]:
            muon = torch.optim.Muon(
                groups[0],
                lr=config.muon_lr,
                weight_decay=config.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
            self.optimizers.insert(0, muon)
            self.peaks.insert(0, config.muon_lr)
        else:
            del self.names[0]

    def rate(self, step: int, total: int) -> float:
        """The share of the peak learning rate at ``step`` of ``total``."""
        warm = min(1.0, (step + 1) / max(1, self.config.warmup_steps))
        decay = max(1.0, total * self.config.decay_share)
        if step < total - decay:
            return warm
        left = (total - step) / decay
        if self.config.schedule == "cosine":
            left = 0.5 - 0.5 * math.cos(math.pi * left)
        return min(warm, left)

    def step(self, rate: float) -> float:
        """Clips, updates and clears the gradients; returns the gradient norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state as named tensors, fit for safetensors."""
        tensors: dict[str, Tensor] = {}
        for optimizer, names in zip(self.optimizers, self.names, strict=True):
            parameters = optimizer.param_groups[0]["params"]
            for name, parameter in zip(names, parameters, strict=True):
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"{name}|{key}"] = torch.as_tensor(value).detach().clone()
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restores what :meth:`state_tensors` gave."""
        for optimizer, names in zip(self.optimizers, self.names, strict=True):
            parameters = optimizer.param_groups[0]["params"]
            for name, parameter in zip(names, parameters, strict=True):
                # AdamW counts its steps on the CPU, whatever the device.
                state: dict[str, Any] = {
                    key.rpartition("|")[2]: value.to(
                        parameter.device if value.ndim else "cpu", copy=True
                    )
                    for key, value in tensors.items()
                    if key.rpartition("|")[0] == name
                }
                if state:
                    optimizer.state[parameter] = state
