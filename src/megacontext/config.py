"""Configuration: frozen, validated models, read from YAML, overridden from the command line.

A key that does not exist and a value outside its range are refused with the key, the value and what
is allowed; nothing is clamped or ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel as PydanticModel
from pydantic import ConfigDict, ValidationError

from megacontext.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="FrozenConfig")


class FrozenConfig(PydanticModel):
    """Base of every configuration: immutable, strict about keys, validated when made."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def parse(cls, values: Mapping[str, Any], *, where: str = "configuration") -> Self:
        """Builds the configuration from plain values.

        Raises:
            ConfigError: a key is unknown, missing, or its value is not allowed.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_explain(error, where)) from None


def load_config(
    config_type: type[ConfigT], path: Path | str | None, overrides: Sequence[str] = ()
) -> ConfigT:
    """Reads a YAML file into ``config_type`` and applies ``key.subkey=value`` overrides.

    Args:
        config_type: the configuration class.
        path: YAML file; ``None`` starts from the defaults.
        overrides: assignments whose right-hand side is parsed as YAML (``focus.max_edits=8``).

    Raises:
        ConfigError: the file cannot be read, is no mapping, or a key or value is not allowed.
    """
    values = _read_yaml(Path(path)) if path is not None else {}
    for assignment in overrides:
        _apply_override(values, assignment)
    return config_type.parse(values, where=str(path) if path is not None else "configuration")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give --config an existing YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top level")
    return values


def _apply_override(values: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {assignment!r}: expected KEY=VALUE, for example seed=1")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise ConfigError(f"override {assignment!r}: the value is not valid YAML") from None
    node = values
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {assignment!r}: {parent!r} holds a value, not keys")
        node = child
    node[leaf] = value


def _explain(error: ValidationError, where: str) -> str:
    problems: list[str] = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            problems.append(f"unknown key {key!r} (value {item['input']!r}); remove or rename it")
        elif item["type"] == "missing":
            problems.append(f"key {key!r} is missing")
        else:
            problems.append(f"key {key!r} has value {item['input']!r}: {item['msg']}")
    return f"{where}: " + "; ".join(problems)
