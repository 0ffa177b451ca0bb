"""Writes slices as Arrow shards that Hugging Face ``datasets`` loads (``load_from_disk``).

Every row is a record batch of its own: what is held in memory does not grow with the data, and the
bytes depend on nothing but the rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as untyped_arrow
import torch
from torch import Tensor

from megacontext.errors import DataError
from megacontext.training.slice_manifest import (
    MANIFEST_FILE,
    Manifest,
    Recipe,
    ShardRecord,
    write_json,
)
from megacontext.training.slices import Place, Window

# pyarrow has no type hints.
pa: Any = untyped_arrow

_CITED_DIGITS = 16


@dataclass(frozen=True)
class Column:
    """One column: a scalar, or an array of fixed shape.

    Attributes:
        name: of the column.
        dtype: Arrow's name of the scalar type, which is the one of ``datasets`` too.
        shape: of the array; empty for a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()

    def arrow_type(self) -> Any:
        """Nested lists of fixed size, outermost dimension first."""
        kind = pa.bool_() if self.dtype == "bool" else getattr(pa, self.dtype)()
        for size in reversed(self.shape):
            kind = pa.list_(kind, size)
        return kind

    def feature(self) -> dict[str, Any]:
        """The column as ``dataset_info.json`` of ``datasets`` describes it."""
        feature: dict[str, Any] = {"dtype": self.dtype, "_type": "Value"}
        for size in reversed(self.shape):
            feature = {"feature": feature, "length": size, "_type": "Sequence"}
        return feature

    def array(self, value: Any) -> Any:
        """An Arrow array of one row."""
        if not self.shape:
            return pa.array([value], type=self.arrow_type())
        flat = pa.array(np.ascontiguousarray(value).reshape(-1))
        for size in reversed(self.shape):
            flat = pa.FixedSizeListArray.from_arrays(flat, size)
        return flat


def columns_of(recipe: Recipe) -> tuple[Column, ...]:
    """The columns of a data set, in order."""
    size, horizon = recipe.slices.context_tokens, recipe.slices.horizon
    columns = [
        Column("context_tokens", "int32", (size,)),
        Column("context_mask", "bool", (size,)),
        Column("future_tokens", "int32", (horizon,)),
    ]
    if (teacher := recipe.teacher) is not None:
        layers, width = len(teacher.layers), teacher.d_model
        columns.append(Column("teacher_states", teacher.dtype, (layers, size, width)))
        if teacher.horizon:
            columns.append(Column("teacher_future_states", teacher.dtype, (layers, horizon, width)))
    columns += [
        Column("source", "string"),
        Column("source_id", "int32"),
        Column("document_id", "int64"),
        Column("offset", "int64"),
        Column("stride", "int32"),
        Column("base_model", "string"),
        Column("tokenizer_hash", "string"),
    ]
    return tuple(columns)


def schema_of(recipe: Recipe) -> Any:
    """The Arrow schema of a data set's shards."""
    return pa.schema([pa.field(c.name, c.arrow_type()) for c in columns_of(recipe)])


class SliceWriter:
    """Writes one data set, shard by shard, and goes on where an earlier run ended.

    A shard has its final name, and a place in the manifest, only when it is whole and on disk.

    Args:
        folder: where the data set goes; made where missing.
        recipe: what it is made by.

    Attributes:
        manifest: what is finished.

    Raises:
        DataError: the folder holds something else, another data set, or cannot be written.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.folder = folder
        self.columns = columns_of(recipe)
        self._schema = schema_of(recipe)
        self.manifest = _begun(folder, recipe)
        self._file: Any = None
        self._writer: Any = None
        self._rows = 0
        self._tokens = 0
        self._place = Place(0, 0, 0)

    @property
    def last(self) -> Place | None:
        """The place of the last slice that is in a finished shard."""
        return self.manifest.shards[-1].end if self.manifest.shards else None

    @property
    def n_slices(self) -> int:
        """Slices written, those of the open shard included."""
        return self.manifest.n_slices + self._rows

    def add(
        self, place: Place, window: Window, states: Tensor | None, documents_skipped: int
    ) -> None:
        """Appends a slice.

        Args:
            place: where it comes from.
            window: its tokens.
            states: ``[layers, n, d_model]`` over the context and, if they are stored, the future.
            documents_skipped: documents left out so far.

        Raises:
            DataError: it cannot be written.
        """
        recipe = self.manifest.recipe
        values = _row(recipe, place, window, states)
        with _writing(self.folder):
            if self._writer is None:
                self._file = self._part.open("wb")
                self._writer = pa.ipc.new_stream(self._file, self._schema)
            arrays = [column.array(values[column.name]) for column in self.columns]
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
            self._rows += 1
            self._tokens += len(window.context)
            self._place = place
            if self._rows == recipe.shard_slices:
                self._finish_shard(documents_skipped)

    def finish(self, documents_skipped: int) -> Manifest:
        """Closes the last shard and marks the data set complete.

        Raises:
            DataError: there is no slice at all, or something cannot be written.
        """
        with _writing(self.folder):
            if self._rows:
                self._finish_shard(documents_skipped)
            if not self.manifest.shards:
                least = self.manifest.recipe.slices
                raise DataError(
                    f"{documents_skipped} documents and none long enough for a slice of "
                    f"{least.context_tokens} + {least.horizon} tokens; lower "
                    "`slices.context_tokens`, or set `slices.short_documents` to pad"
                )
            self._describe()
            self._update(complete=True, documents_skipped=documents_skipped)
        return self.manifest

    def close(self) -> None:
        """Drops the open shard; the finished ones stand."""
        if self._file is not None:
            self._file.close()
            self._part.unlink(missing_ok=True)
            self._file = self._writer = None

    @property
    def _name(self) -> str:
        return f"shard-{len(self.manifest.shards):05d}.arrow"

    @property
    def _part(self) -> Path:
        return self.folder / f"{self._name}.part"

    def _finish_shard(self, documents_skipped: int) -> None:
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        record = ShardRecord(
            file=self._name,
            slices=self._rows,
            context_tokens=self._tokens,
            bytes=self._part.stat().st_size,
            sha256=file_digest(self._part),
            last=(self._place.source, self._place.document, self._place.offset),
            documents_skipped=documents_skipped,
        )
        self._part.replace(self.folder / self._name)
        self._file = self._writer = None
        self._rows = self._tokens = 0
        self._update(shards=(*self.manifest.shards, record))

    def _update(self, **changes: Any) -> None:
        self.manifest = self.manifest.model_copy(update=changes)
        self.manifest.write(self.folder)

    def _describe(self) -> None:
        """Writes what ``datasets.load_from_disk`` needs beside the shards."""
        manifest = self.manifest
        size = sum(shard.bytes for shard in manifest.shards)
        name = "megacontext_slices"
        split = {"name": "train", "num_bytes": size, "num_examples": manifest.n_slices}
        info = {
            "citation": "",
            "dataset_name": name,
            "dataset_size": size,
            "description": "Context slices, the tokens that follow them, and teacher states.",
            "features": {column.name: column.feature() for column in self.columns},
            "homepage": "",
            "license": "",
            "splits": {"train": {**split, "dataset_name": name}},
        }
        digests = json.dumps([shard.sha256 for shard in manifest.shards])
        state = {
            "_data_files": [{"filename": shard.file} for shard in manifest.shards],
            "_fingerprint": hashlib.sha256(digests.encode()).hexdigest()[:_CITED_DIGITS],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": "train",
        }
        write_json(self.folder / "dataset_info.json", info)
        write_json(self.folder / "state.json", state)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _begun(folder: Path, recipe: Recipe) -> Manifest:
    """The manifest of the folder, new or of an earlier run of the same recipe."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        present = {path.name for path in folder.iterdir() if path.suffix != ".part"}
        if not present:
            manifest = Manifest(recipe=recipe)
            manifest.write(folder)
            return manifest
    if MANIFEST_FILE not in present:
        raise DataError(
            f"{folder}: holds {min(present)} and no data set; give a new or empty `output`"
        )
    manifest = Manifest.read(folder)
    difference = manifest.recipe.difference(recipe)
    if difference is not None:
        raise DataError(
            f"{folder}: holds a data set prepared with {difference}; give another `output`, or "
            "remove the folder"
        )
    for shard in manifest.shards:
        path = folder / shard.file
        if not path.is_file() or path.stat().st_size != shard.bytes:
            raise DataError(f"{path}: missing or of the wrong size; remove the folder, start anew")
    return manifest


def _row(recipe: Recipe, place: Place, window: Window, states: Tensor | None) -> dict[str, Any]:
    size, length = recipe.slices.context_tokens, len(window.context)
    tokens = torch.full((size,), recipe.pad_token, dtype=torch.int32)
    tokens[:length] = window.context
    row: dict[str, Any] = {
        "context_tokens": tokens.numpy(),
        "context_mask": np.arange(size) < length,
        "future_tokens": window.future.to(torch.int32).numpy(),
        "source": recipe.sources[place.source].name,
        "source_id": place.source,
        "document_id": place.document,
        "offset": place.offset,
        "stride": recipe.slices.step,
        "base_model": recipe.base_model,
        "tokenizer_hash": recipe.tokenizer_hash,
    }
    if states is not None:
        padded = states.new_zeros(states.shape[0], size, states.shape[2])
        padded[:, :length] = states[:, :length]
        row["teacher_states"] = padded.numpy()
        row["teacher_future_states"] = states[:, length:].numpy()
    return row


@contextmanager
def _writing(folder: Path) -> Generator[None, None, None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written: {error.strerror or error}; finished shards stand, the "
            "same command goes on with them"
        ) from None
