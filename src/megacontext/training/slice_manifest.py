"""What a folder of prepared slices says about itself: ``manifest.json``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.errors import ConfigError, DataError
from megacontext.training.slices import Place, SliceConfig

MANIFEST_FILE = "manifest.json"
FORMAT_VERSION = 1


class SourceFile(FrozenConfig):
    """A file of the corpus, as it was when it was cut."""

    name: str
    bytes: int
    sha256: str


class TeacherRecipe(FrozenConfig):
    """Which states are stored, and whose.

    Attributes:
        weights: fingerprint of the model.
        model_dtype: dtype it ran in.
        layers: numbers of the states, 0 (input embeddings) to the number of layers (final).
        d_model: their width.
        horizon: whether those of the future are stored as well.
        dtype: of the stored states.
    """

    weights: str
    model_dtype: str
    layers: tuple[int, ...]
    d_model: int
    horizon: bool
    dtype: str


class Recipe(FrozenConfig):
    """All that the bytes of the shards follow from."""

    base_model: str
    tokenizer_hash: str
    pad_token: int
    slices: SliceConfig
    teacher: TeacherRecipe | None
    sources: tuple[SourceFile, ...]
    shard_slices: int
    max_slices: int | None

    def difference(self, other: Recipe) -> str | None:
        """The first thing in which two recipes differ, in words; ``None`` where they agree."""
        mine, theirs = _flat(self.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                return f"{key} {mine.get(key)}, not {theirs.get(key)}"
        return None


class ShardRecord(FrozenConfig):
    """A finished shard.

    Attributes:
        file: its name in the folder.
        slices: rows.
        context_tokens: tokens of their contexts, padding not counted.
        bytes: size of the file.
        sha256: of the file.
        last: source, document and offset of its last slice.
        documents_skipped: documents too short for a slice, up to that slice.
    """

    file: str
    slices: int = Field(ge=1)
    context_tokens: int
    bytes: int
    sha256: str
    last: tuple[int, int, int]
    documents_skipped: int

    @property
    def end(self) -> Place:
        """Where its last slice comes from."""
        return Place(*self.last)


class Manifest(FrozenConfig):
    """Everything about a folder of slices except the slices.

    Attributes:
        version: of the format.
        complete: whether the whole corpus is in.
        recipe: how it was made.
        shards: the finished shards, in order.
        documents_skipped: documents too short for a slice.
    """

    version: int = FORMAT_VERSION
    complete: bool = False
    recipe: Recipe
    shards: tuple[ShardRecord, ...] = ()
    documents_skipped: int = 0

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Reads the manifest of a folder.

        Raises:
            DataError: there is none, or it is damaged or of a newer format.
        """
        path = folder / MANIFEST_FILE
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise DataError(
                f"{folder}: no prepared data set; make one with `python -m tools.prepare_dataset`"
            ) from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}; prepare the data anew") from None
        version = values.get("version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(
                f"{path}: format version {version}, this MegaContext reads {FORMAT_VERSION}; "
                "prepare the data anew"
            )
        try:
            return cls.parse(values, where=str(path))
        except ConfigError as error:
            raise DataError(f"{error}; prepare the data anew") from None

    def write(self, folder: Path) -> None:
        """Writes the manifest, whole or not at all."""
        write_json(folder / MANIFEST_FILE, self.model_dump(mode="json"))

    @property
    def n_slices(self) -> int:
        """Slices of all shards."""
        return sum(shard.slices for shard in self.shards)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    part.replace(path)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
