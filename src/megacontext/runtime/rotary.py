"""Rotating keys exactly as the base model does, with its own modules (RoPE, 2104.09864)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megacontext.errors import ModelError
from megacontext.runtime.architectures import Architecture, attention_modules
from megacontext.runtime.kv_cache import layer_entries, new_entries

# A second position for the self-check: far enough to turn every fast frequency visibly.
_PROBE_POSITION = 3


class KeyRotation:
    """The rotation which a model applies to its keys, per layer.

    The rotary module and the rotation function are the architecture's own, so that partial rotary
    dimensions, interleaved layouts, scaled frequencies and per-layer-type frequencies come out as
    in the model. Which layers rotate at all is *measured*: a lone token attends only to itself, so
    its keys in any layer depend on its position through the rotation only. The same measurement
    proves the rotation right before it is used.

    Raises:
        ModelError: the model's keys are not rotated by a module this class can drive (absolute
            positions, ALiBi, latent attention, layers that share keys).
    """

    def __init__(self, model: Any, architecture: Architecture, name: str) -> None:
        self._refusal = (
            f"{name}: keys of {model.config.model_type} cannot be supplied from outside; use a "
            "GistNet with the 'embedding' reader"
        )
        decoder = model.get_decoder()
        attention = attention_modules(model, architecture.n_layers, name)[0]
        modeling = sys.modules[type(attention).__module__]
        if not hasattr(decoder, "rotary_emb") or not hasattr(modeling, "apply_rotary_pos_emb"):
            raise ModelError(self._refusal)
        self._rotary: Any = decoder.rotary_emb
        self._apply: Any = modeling.apply_rotary_pos_emb
        self._by_layer_type = "layer_type" in inspect.signature(self._rotary.forward).parameters
        config = model.config.get_text_config(decoder=True)
        layer_types = config.layer_types if self._by_layer_type else [""] * architecture.n_layers
        self._groups = _group(layer_types)
        self._groups = self._measure(model, architecture)

    @property
    def rotated_layers(self) -> list[int]:
        """Indices of the layers whose keys are rotated."""
        return sorted(index for indices in self._groups.values() for index in indices)

    def rotate(self, keys: Tensor, positions: Tensor, last_position: int | None = None) -> Tensor:
        """Rotates keys to positions.

        Args:
            keys: ``[layers, n, kv_heads, head_dim]``, not rotated.
            positions: ``[n]`` int64.
            last_position: greatest position of the whole sequence; models which choose their
                frequencies by length (LongRoPE) choose by it. Defaults to the greatest given.

        Returns:
            ``[layers, n, kv_heads, head_dim]`` of the dtype of ``keys``.
        """
        return self._turn(keys, positions, last_position, inverse=False)

    def unrotate(self, keys: Tensor, positions: Tensor, last_position: int | None = None) -> Tensor:
        """Undoes :meth:`rotate`; same shapes."""
        return self._turn(keys, positions, last_position, inverse=True)

    def shift(
        self,
        keys: Sequence[Tensor],
        positions: Tensor,
        new_positions: Tensor,
        *,
        last_position: int | None = None,
        new_last_position: int | None = None,
    ) -> list[Tensor]:
        """Moves rotated keys to other positions, in one rotation by the difference.

        Args:
            keys: of every layer, ``[1, kv_heads, n, head_dim]`` as a cache holds them, rotated to
                ``positions``.
            positions: ``[n]`` int64, where they are.
            new_positions: ``[n]`` int64, where they shall be.
            last_position: greatest position of the sequence when they were rotated; see
                :meth:`rotate`.
            new_last_position: greatest position of the sequence they become part of.

        Returns:
            Such keys again, in the dtype of ``keys``; those of a layer without rotation are the
            same tensor. Angles are computed in float32, so that keys lose no more than one rounding
            each time they move, and keys that stay where they are keep their bits.
        """
        shifted = list(keys)
        exact = torch.empty(0, device=positions.device)
        stays = (positions == new_positions)[:, None]
        for layer_type, indices in self._groups.items():
            cos, sin = self._cos_sin(exact, positions, last_position, layer_type)
            new_cos, new_sin = self._cos_sin(exact, new_positions, new_last_position, layer_type)
            scale = cos.square() + sin.square()  # not 1 where the model scales attention
            by_cos = ((new_cos * cos + new_sin * sin) / scale).masked_fill(stays, 1.0)
            by_sin = ((new_sin * cos - new_cos * sin) / scale).masked_fill(stays, 0.0)
            width = by_cos.shape[-1]
            for index in indices:
                part = keys[index][..., :width]
                # The function turns queries as well: of these as few as there may be.
                part = self._apply(part[:, :1], part, by_cos, by_sin)[1].to(part.dtype)
                rest = keys[index][..., width:]
                shifted[index] = torch.cat((part, rest), dim=-1) if rest.shape[-1] else part
        return shifted

    def _turn(
        self, keys: Tensor, positions: Tensor, last_position: int | None, *, inverse: bool
    ) -> Tensor:
        if keys.shape[1] == 0:
            return keys
        turned = keys.clone()
        for layer_type, indices in self._groups.items():
            cos, sin = self._cos_sin(keys, positions, last_position, layer_type)
            if inverse:
                scale = cos.square() + sin.square()  # not 1 where the model scales attention
                cos, sin = cos / scale, -sin / scale
            width = cos.shape[-1]
            # [layers, heads, n, rotary_dim]: the layout the architecture's function expects
            part = keys[indices].transpose(1, 2)[..., :width]
            part = self._apply(part, part, cos, sin)[1]
            turned[indices, ..., :width] = part.transpose(1, 2).to(keys.dtype)
        return turned

    def _cos_sin(
        self, keys: Tensor, positions: Tensor, last_position: int | None, layer_type: str
    ) -> tuple[Tensor, Tensor]:
        row = positions
        if last_position is not None:
            row = torch.cat([positions, positions.new_tensor([last_position])])
        arguments = (layer_type,) if self._by_layer_type else ()
        cos, sin = self._rotary(keys, row[None].to(keys.device), *arguments)
        n = positions.shape[0]
        return cos[:, :n], sin[:, :n]

    @torch.inference_mode()
    def _measure(self, model: Any, architecture: Architecture) -> dict[str, list[int]]:
        dtype, device = model.dtype, model.device
        # A token's embedding could be zero (padding); this vector has every component alive.
        vector = torch.sin(torch.arange(1.0, architecture.d_model + 1, device=device)).to(dtype)
        home, away = (
            _lone_keys(model, vector, position, architecture, self._refusal)
            for position in (0, _PROBE_POSITION)
        )
        probe = torch.tensor([_PROBE_POSITION], device=device)
        plain = self._turn(home, torch.zeros_like(probe), None, inverse=True)
        turned = self._turn(plain, probe, None, inverse=False)
        off_turned, off_plain = _distances(turned, away), _distances(home, away)
        tolerance = 1e-3 if dtype == torch.float32 else 5e-2
        if any(min(pair) > tolerance for pair in zip(off_turned, off_plain, strict=True)):
            raise ModelError(self._refusal)
        return {
            layer_type: kept
            for layer_type, indices in self._groups.items()
            if (kept := [index for index in indices if off_turned[index] < off_plain[index]])
        }


def _lone_keys(
    model: Any, vector: Tensor, position: int, architecture: Architecture, refusal: str
) -> Tensor:
    """Keys of a single token at ``position``: ``[layers, 1, kv_heads, head_dim]``."""
    entries = new_entries()
    positions = torch.tensor([[position]], device=vector.device)
    model.get_decoder()(
        inputs_embeds=vector[None, None],
        position_ids=positions,
        past_key_values=entries,
        use_cache=True,
    )
    expected = (1, architecture.n_kv_heads, 1, architecture.head_dim)
    keys = [key for key, _ in layer_entries(entries)]
    # A layer that borrows another's keys leaves its own entry empty.
    shapes = [getattr(key, "shape", None) for key in keys]
    if shapes != [expected] * architecture.n_layers:
        raise ModelError(refusal)
    return torch.stack([key[0].transpose(0, 1) for key in keys])


def _distances(keys: Tensor, other: Tensor) -> list[float]:
    """Relative distance per layer."""
    apart = (keys - other).float().square().flatten(1).sum(dim=1)
    size = other.float().square().flatten(1).sum(dim=1)
    return [float(value) for value in (apart / size).sqrt()]


def _group(layer_types: list[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for index, layer_type in enumerate(layer_types):
        groups.setdefault(layer_type, []).append(index)
    return groups
