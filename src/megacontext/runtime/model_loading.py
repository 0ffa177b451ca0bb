"""Finding and loading a frozen base model and its tokenizer."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM as UntypedModel
from transformers import AutoTokenizer as UntypedTokenizer

from megacontext.errors import CheckpointError, ConfigError, ModelError, ModelNotFoundError

# transformers describes what its loaders take and return only in part.
AutoModelForCausalLM: Any = UntypedModel
AutoTokenizer: Any = UntypedTokenizer

BUNDLED_PREFIX = "bundled:"


def bundled_models() -> list[str]:
    """Names of the models shipped in the package, sorted."""
    folder = resources.files("megacontext") / "assets"
    if not folder.is_dir():
        return []
    return sorted(entry.name for entry in folder.iterdir() if (entry / "config.json").is_file())


def resolve_model(name_or_path: str | Path) -> tuple[str, bool]:
    """Where a model lies, and whether that is a local folder (else it is a hub id).

    Raises:
        ModelNotFoundError: a bundled name or a folder does not exist or holds no model.
    """
    name = str(name_or_path)
    if name.startswith(BUNDLED_PREFIX):
        bundled = name.removeprefix(BUNDLED_PREFIX)
        if bundled not in bundled_models():
            known = ", ".join(BUNDLED_PREFIX + known for known in bundled_models()) or "none"
            raise ModelNotFoundError(f"{name}: no such bundled model; bundled are: {known}")
        return str(resources.files("megacontext") / "assets" / bundled), True
    try:
        folder = Path(name).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:
        raise ModelNotFoundError(f"{name[:80]}: no such folder: {_line(error)}") from None
    if is_folder:
        if not (folder / "config.json").is_file():
            raise ModelNotFoundError(
                f"{name}: this folder holds no config.json; give a folder written by "
                "save_pretrained"
            )
        return str(folder), True
    # A hub id is NAME or OWNER/NAME; anything else can only be meant as a folder.
    if isinstance(name_or_path, Path) or name.startswith((".", "~", "/")) or name.count("/") > 1:
        raise ModelNotFoundError(f"{name}: no such folder; give an existing model folder or hub id")
    return name, False


def load_model(
    name_or_path: str | Path, dtype: torch.dtype | str, device: torch.device | str
) -> tuple[Any, Any]:
    """Loads a causal language model and its tokenizer; never runs code from the hub.

    Raises:
        ModelNotFoundError: nothing lies under that name, or the hub cannot be reached.
        CheckpointError: the weights are missing, damaged or incomplete.
        ModelError: transformers knows no such causal language model or tokenizer.
        ConfigError: the dtype or device does not exist here.
    """
    torch_dtype, torch_device = parse_dtype(dtype), parse_device(device)
    source, local = resolve_model(name_or_path)
    name = str(name_or_path)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=torch_dtype,
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=local,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{name}: damaged weights: {_line(error)}; copy them anew") from None
    except (OSError, HFValidationError) as error:
        raise _unreadable(name, error, local=local) from None
    # A configuration that makes no sense ends in any exception at all, deep inside transformers.
    except Exception as error:  # noqa: BLE001
        raise ModelError(
            f"{name}: transformers cannot load this as a causal language model: {_line(error)}"
        ) from None
    missing: list[str] = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name}: the weights lack {len(missing)} tensors, first {missing[0]}; copy them anew"
        )
    return model.to(torch_device), _load_tokenizer(source, name, local=local)


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """A floating-point dtype, by itself or by name; ``"auto"`` is that of the checkpoint.

    Raises:
        ConfigError: there is no such floating-point dtype.
    """
    if dtype == "auto":
        return "auto"
    parsed = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ConfigError(f"dtype {dtype!r}: expected auto, float32, bfloat16 or float16")
    return parsed


def parse_device(device: torch.device | str) -> torch.device:
    """A device that exists on this machine.

    Raises:
        ConfigError: the name is wrong, or there is no such device.
    """
    try:
        parsed = torch.device(device)
        torch.empty(0, device=parsed)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device {str(device)!r} cannot be used: {_line(error)}") from None
    return parsed


def _load_tokenizer(source: str, name: str, *, local: bool) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, local_files_only=local
        )
    except Exception as error:  # noqa: BLE001 - tokenizers raises Exception itself
        raise ModelError(
            f"{name}: the tokenizer cannot be loaded: {_line(error)}; save it beside the model"
        ) from None
    # Without tokenizer files, transformers makes up one that knows no text.
    if not tokenizer("text", add_special_tokens=False)["input_ids"]:
        raise ModelError(f"{name}: there is no usable tokenizer; save it beside the model")
    return tokenizer


def _unreadable(name: str, error: Exception, *, local: bool) -> ModelError:
    if local:
        return CheckpointError(f"{name}: cannot be read: {_line(error)}")
    return ModelNotFoundError(
        f"{name}: no such folder, and no such model in the local hub cache or on the hub; give a "
        "local folder, point HF_HOME at a cache that has it, or unset HF_HUB_OFFLINE to download it"
    )


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
