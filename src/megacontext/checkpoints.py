"""Checkpoints in the Hugging Face layout: ``config.json`` beside ``model.safetensors``.

Nothing is ever unpickled, and a folder that does not fit is refused with the file, the tensor and
the shapes, so that a wrong checkpoint can never half load.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megacontext.config import FrozenConfig
from megacontext.errors import CheckpointError, ConfigError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
VERSION_DIGITS = 16

ConfigT = TypeVar("ConfigT", bound=FrozenConfig)


@contextmanager
def seeded_init(seed: int) -> Generator[None, None, None]:
    """Draws initial weights from ``seed`` and leaves the caller's random state as it was."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would also reseed every accelerator, which fork_rng here does not save.
        torch.default_generator.manual_seed(seed)
        yield


def hash_weights(weights: Mapping[str, Tensor], prefix: str = "") -> str:
    """16 hexadecimal digits that change with ``prefix`` and with any name, dtype, shape or value.

    Args:
        weights: tensors by name, on any device; their order does not matter.
        prefix: whatever else the digits shall depend on.
    """
    digest = hashlib.sha256(prefix.encode())
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:VERSION_DIGITS]


class PretrainedModule(nn.Module, Generic[ConfigT]):
    """A module that is its frozen configuration plus weights.

    Subclasses set ``model_type`` and ``config_type`` and take the configuration as the only
    argument of ``__init__``, where they draw their initial weights under :func:`seeded_init`.
    """

    model_type: ClassVar[str]
    config_type: ClassVar[type[FrozenConfig]]

    def __init__(self, config: ConfigT) -> None:
        super().__init__()
        self.config: ConfigT = config

    @property
    def version(self) -> str:
        """Hash of configuration and weights, 16 hexadecimal digits, the same on every run.

        Every read hashes all weights anew, so that it can never be stale: keep the string where
        it is needed often.
        """
        # Without defaults, so that a later option that is off does not orphan every memory.
        chosen = self.config.model_dump(mode="json", exclude_defaults=True)
        made_of = f"{self.model_type} {json.dumps(chosen, sort_keys=True)}"
        return hash_weights(self.state_dict(), made_of)

    def save_pretrained(self, folder: Path | str) -> None:
        """Writes ``config.json`` and ``model.safetensors`` into ``folder``, made where missing.

        Each file appears whole or not at all.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        folder = Path(folder)
        tensors = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        config_text = json.dumps(self._described(), indent=2, sort_keys=True) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            weights_part = folder / f"{WEIGHTS_FILE}.part"
            save_file(tensors, weights_part, metadata={"format": "pt"})
            weights_part.replace(folder / WEIGHTS_FILE)
            config_part = folder / f"{CONFIG_FILE}.part"
            config_part.write_text(config_text, encoding="utf-8")
            config_part.replace(folder / CONFIG_FILE)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{folder}: the checkpoint cannot be written: {error}; choose a writable folder"
            ) from None

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Loads what :meth:`save_pretrained` wrote, in evaluation mode.

        Args:
            folder: the checkpoint's folder.
            device: where the weights go.
            dtype: floating type of the weights; ``None`` keeps the file's.

        Raises:
            CheckpointError: a file is missing or damaged, belongs to another kind of model, has an
                unknown configuration key, or a tensor is missing, too many, or of another shape.
        """
        folder = Path(folder)
        config = read_config(folder, cls.model_type, cls.config_type)
        with torch.device("meta"):
            model = cls(config)  # pyright: ignore[reportArgumentType]
        tensors = read_weights(folder / WEIGHTS_FILE, model.state_dict())
        model.load_state_dict(tensors, assign=True)
        return model.to(device=device, dtype=dtype).eval()

    def _described(self) -> dict[str, Any]:
        return {"model_type": self.model_type, **self.config.model_dump(mode="json")}


def read_config(folder: Path, model_type: str, config_type: type[ConfigT]) -> ConfigT:
    """Reads ``folder/config.json`` and checks that it describes a ``model_type``.

    Raises:
        CheckpointError: the file is missing, no JSON mapping, of another model type, or one of its
            keys is unknown or not allowed.
    """
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; give the folder of a checkpoint") from None
    # Besides the errors of JSON, numbers of thousands of digits and lists in lists in lists.
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path}: cannot be read: {reason}; restore the file") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON mapping at the top level")
    found = values.pop("model_type", None)
    if found != model_type:
        raise CheckpointError(
            f"{path}: model_type is {found!r}, expected {model_type!r}; give the folder of a "
            f"{model_type} checkpoint"
        )
    try:
        return config_type.parse(values, where=str(path))
    except ConfigError as error:
        raise CheckpointError(f"{error}; the checkpoint needs another version") from None


def read_weights(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reads a safetensors file that must hold exactly the tensors of ``expected``.

    Args:
        path: the file.
        expected: name to a tensor of the right shape (its values and device do not matter).

    Returns:
        The tensors in memory of their own, all of one floating type.

    Raises:
        CheckpointError: the file is missing or damaged, or names, shapes or types do not fit.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; give the folder of a complete checkpoint")
    try:
        # A copy, since tensors that map the file would die with it.
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file: {error}; restore it from a copy"
        ) from None
    for problem in _misfits(tensors, expected):
        raise CheckpointError(f"{path}: {problem}; the weights do not belong to {CONFIG_FILE}")
    return tensors


def _misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[str]:
    for name in sorted(expected.keys() - tensors.keys()):
        yield f"tensor {name!r} {tuple(expected[name].shape)} is missing"
    for name in sorted(tensors.keys() - expected.keys()):
        yield f"tensor {name!r} {tuple(tensors[name].shape)} is not part of the model"
    first = next(iter(tensors.values()), None)
    for name, tensor in tensors.items():
        shape, wanted = tuple(tensor.shape), tuple(expected[name].shape)
        if shape != wanted:
            yield f"tensor {name!r} has shape {shape}, expected {wanted}"
        if not tensor.is_floating_point() or (first is not None and tensor.dtype != first.dtype):
            yield f"tensor {name!r} has type {tensor.dtype}, expected one floating type for all"
