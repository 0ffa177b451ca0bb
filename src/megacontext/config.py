"""Configuration: frozen, validated models, read from YAML, overridden from the command line.

A key that does not exist and a value outside its range are refused with the key, the value and what
is allowed; nothing is clamped or ignored.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import yaml
from pydantic import BaseModel as PydanticModel
from pydantic import ConfigDict, ValidationError, field_validator

from megacontext.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound="FrozenConfig")

# What no file name can hold, and no file: U+0000 and the halves of surrogate pairs.
_UNUSABLE: Final = frozenset({"\0", *map(chr, range(0xD800, 0xE000))})

_MOST_CHARACTERS: Final = 1 << 20
_MOST_LEVELS: Final = 32
_MOST_PROBLEMS: Final = 8

# Aliases make a few lines of YAML stand for more values than could ever be printed.
_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 3


class FrozenConfig(PydanticModel):
    """Base of every configuration: immutable, strict about keys, validated when made."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @field_validator("*", mode="after")
    @classmethod
    def _check_text(cls, value: Any) -> Any:
        if isinstance(value, str | Path) and not _UNUSABLE.isdisjoint(str(value)):
            raise ValueError("it holds a zero character or half a character")
        return value

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
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give --config an existing YAML file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(f"{path}: more than {_MOST_CHARACTERS} characters; this is no YAML file")
    values = _parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top level")
    return values


def _parse_yaml(text: str, where: str) -> Any:
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > _MOST_LEVELS:
                raise ConfigError(f"{where}: nested deeper than {_MOST_LEVELS} levels; flatten it")
        return yaml.safe_load(text)
    # Besides its own errors, PyYAML lets those of Python through: of a month 13, a number of
    # thousands of digits, or a tag that does not go with its value.
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply_override(values: dict[str, Any], assignment: str) -> None:
    key, separator, text = assignment.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {_shown(assignment)}: expected KEY=VALUE, for example seed=1")
    shown = _shown(assignment)
    value = _parse_yaml(text, f"override {shown}") if text else ""
    node = values
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {shown}: {parent!r} holds a value, not keys")
        node = child
    node[leaf] = value


def _shown(value: Any) -> str:
    try:
        return _SHORT.repr(value)
    except ValueError:
        return "a number of thousands of digits"


def _explain(error: ValidationError, where: str) -> str:
    problems: list[str] = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(top level)"
        if item["type"] == "extra_forbidden":
            problems.append(
                f"unknown key {key!r} (value {_shown(item['input'])}); remove or rename it"
            )
        elif item["type"] == "missing":
            problems.append(f"key {key!r} is missing")
        else:
            told = " ".join(item["msg"].split())
            problems.append(f"key {key!r} has value {_shown(item['input'])}: {told}")
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"… and {len(problems) - _MOST_PROBLEMS} more"]
    return f"{where}: " + "; ".join(problems)
