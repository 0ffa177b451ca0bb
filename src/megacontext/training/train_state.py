"""The whole state of a run in one safetensors file, switched by renaming."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megacontext.errors import CheckpointError


def save_state(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a checkpoint beside the last one and puts it in its place."""
    fresh = path.with_suffix(".tmp")
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    save_file(contiguous, fresh, metadata=dict(metadata))
    fresh.replace(path)


def load_state(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what :func:`save_state` wrote.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a whole checkpoint: {error}; delete it to start anew"
        ) from None
    return tensors, metadata


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with ``prefix`` before their names."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def require_shapes(
    path: Path, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], advice: str
) -> None:
    """Refuses tensors that are not, name by name, those of ``expected``.

    Raises:
        CheckpointError: names the first that is missing, too many or of another shape.
    """
    for name in sorted(expected.keys() | state.keys()):
        shapes = [tuple(t[name].shape) if name in t else None for t in (state, expected)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {shapes[0]}, expected {shapes[1]}; {advice}"
            )
