"""Reads prepared slices, for a base model that they belong to."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as untyped_arrow
import torch
from torch import Tensor
from torch.utils.data import Dataset

from megacontext.errors import DataError
from megacontext.runtime.base_model import BaseModel
from megacontext.training.slice_manifest import Manifest
from megacontext.training.slice_store import columns_of, file_digest, schema_of
from megacontext.training.teacher_states import weights_fingerprint

# pyarrow has no type hints.
pa: Any = untyped_arrow


@dataclass(frozen=True, eq=False)
class PreparedSlice:
    """One slice.

    Attributes:
        context_tokens: ``[context_tokens]`` int64, padded at the end.
        context_mask: ``[context_tokens]`` bool, false on padding.
        future_tokens: ``[horizon]`` int64, what follows the last token that is not padding.
        teacher_states: ``[layers, context_tokens, d_model]``, zero on padding.
        teacher_future_states: ``[layers, horizon, d_model]``.
        source: name of the file.
        source_id: number of the file in the corpus.
        document_id: number of the document in its file.
        offset: token of the document at which the context begins.
    """

    context_tokens: Tensor
    context_mask: Tensor
    future_tokens: Tensor
    teacher_states: Tensor | None
    teacher_future_states: Tensor | None
    source: str
    source_id: int
    document_id: int
    offset: int


class PreparedDataset(Dataset[PreparedSlice]):
    """The slices of a folder, memory-mapped; a map-style torch data set. Made by :meth:`open`.

    Attributes:
        folder: where it lies.
        manifest: what it was made from.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shapes = {column.name: column.shape for column in columns_of(manifest.recipe)}
        self._ends = list(accumulate(shard.slices for shard in manifest.shards))
        self._tables: dict[int, Any] = {}

    @classmethod
    def open(cls, folder: Path | str, base: BaseModel | None = None) -> Self:
        """Opens a finished data set.

        Args:
            folder: what ``tools.prepare_dataset`` wrote.
            base: the model it will be used with; ``None``: not checked.

        Raises:
            DataError: there is none, it is unfinished or damaged, its tokens come from another
                tokenizer, or its teacher states from another model.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if not manifest.complete:
            raise DataError(
                f"{folder}: unfinished after {len(manifest.shards)} shards; run the "
                "`python -m tools.prepare_dataset` that began it again"
            )
        if base is not None:
            _check_owner(folder, manifest, base)
        for shard in manifest.shards:
            path = folder / shard.file
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise DataError(f"{path}: missing or of the wrong size; prepare the data anew")
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.n_slices

    def __getitem__(self, index: int) -> PreparedSlice:
        """Slice ``index``; its tensors are copies.

        Raises:
            IndexError: there is no such slice.
            DataError: the shard is damaged.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"slice {index} of {len(self)}")
        shard = bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        table = self._table(shard)

        def scalar(name: str) -> Any:
            return table.column(name)[row].as_py()

        def array(name: str) -> Tensor | None:
            return self._array(table, name, row) if name in self._shapes else None

        return PreparedSlice(
            context_tokens=self._array(table, "context_tokens", row).long(),
            context_mask=self._array(table, "context_mask", row),
            future_tokens=self._array(table, "future_tokens", row).long(),
            teacher_states=array("teacher_states"),
            teacher_future_states=array("teacher_future_states"),
            source=scalar("source"),
            source_id=scalar("source_id"),
            document_id=scalar("document_id"),
            offset=scalar("offset"),
        )

    def verify(self) -> None:
        """Compares every shard with its checksum.

        Raises:
            DataError: a shard is not what was written.
        """
        for shard in self.manifest.shards:
            if file_digest(self.folder / shard.file) != shard.sha256:
                raise DataError(
                    f"{self.folder / shard.file}: the checksum is not that of the manifest; "
                    "prepare the data anew"
                )

    def _array(self, table: Any, name: str, row: int) -> Tensor:
        shape = self._shapes[name]
        values = table.column(name).slice(row, 1).combine_chunks()
        for _ in shape:
            values = values.flatten()
        flat: np.ndarray[Any, Any] = values.to_numpy(zero_copy_only=False)
        return torch.from_numpy(flat.reshape(shape).copy())

    def _table(self, shard: int) -> Any:
        if shard not in self._tables:
            record = self.manifest.shards[shard]
            path = self.folder / record.file
            try:
                table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{path}: cannot be read: {error}; prepare it anew") from None
            if table.schema != schema_of(self.manifest.recipe) or len(table) != record.slices:
                raise DataError(
                    f"{path}: not the {record.slices} slices that the manifest tells of; prepare "
                    "the data anew"
                )
            self._tables[shard] = table
        return self._tables[shard]

    def __getstate__(self) -> dict[str, Any]:
        # Workers of a DataLoader map the shards themselves.
        return {**self.__dict__, "_tables": {}}


def _check_owner(folder: Path, manifest: Manifest, base: BaseModel) -> None:
    recipe = manifest.recipe
    if recipe.tokenizer_hash != base.tokenizer_hash:
        raise DataError(
            f"{folder}: its tokens were made for {recipe.base_model} (tokenizer "
            f"{recipe.tokenizer_hash}), {base.name} has tokenizer {base.tokenizer_hash}; prepare "
            "the data for this model"
        )
    if recipe.teacher is None:
        return
    weights = weights_fingerprint(base.model)
    if recipe.teacher.weights != weights:
        raise DataError(
            f"{folder}: its teacher states come from {recipe.base_model} (weights "
            f"{recipe.teacher.weights}), {base.name} has weights {weights}; prepare the data for "
            "this model, or without teacher states (teacher.enabled=false)"
        )
