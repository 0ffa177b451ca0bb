"""Snapshots of working contexts on disk: what LensNet saw, and what the right scores were.

A data set is a folder of safetensors shards and an ``index.json``. A shard holds each field of its
snapshots end to end in one tensor, beside the counts that cut it apart again.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megacontext.errors import DataError

INDEX_FILE = "index.json"
FORMAT = "megacontext-snapshots"
FORMAT_VERSION = 2

_GROUPS = ("entry", "cache", "tail")


@dataclass(frozen=True)
class Snapshot:
    """One refocus: ``n`` entries, ``m`` cache items, ``t`` tail tokens.

    Utilities are in nats over the horizon; NaN where none was measured. Vectors, features and
    hidden states are kept in the floating type they come in.

    Attributes:
        entry_levels: int64 ``[n]``.
        entry_starts: int64 ``[n]``, first token.
        entry_vectors: ``[n, gist_width]``.
        entry_features: ``[n, n_features]``.
        entry_can_expand: bool ``[n]``.
        entry_can_collapse: bool ``[n]``.
        entry_utility: float32 ``[n]``, signed as lens scores are.
        cache_levels: int64 ``[m]``.
        cache_starts: int64 ``[m]``.
        cache_vectors: ``[m, gist_width]``.
        cache_features: ``[m, n_features]``.
        cache_utility: float32 ``[m]``.
        cache_evidence: float32 ``[m]``: 1 where it is known to tell what comes, 0 where it is known
            not to, NaN where neither is known.
        tail_hidden: ``[t, d_model]``, oldest first.
        cursor: int64 scalar.
        tail_start: int64 scalar, first token of the tail.
    """

    entry_levels: Tensor
    entry_starts: Tensor
    entry_vectors: Tensor
    entry_features: Tensor
    entry_can_expand: Tensor
    entry_can_collapse: Tensor
    entry_utility: Tensor
    cache_levels: Tensor
    cache_starts: Tensor
    cache_vectors: Tensor
    cache_features: Tensor
    cache_utility: Tensor
    cache_evidence: Tensor
    tail_hidden: Tensor
    cursor: Tensor
    tail_start: Tensor


FIELDS = tuple(field.name for field in fields(Snapshot))


def group_of(field: str) -> str | None:
    """Which count a field's first dimension has; ``None`` for a scalar."""
    group = field.partition("_")[0]
    return None if field in {"cursor", "tail_start"} else group


def write_snapshots(
    folder: Path | str, snapshots: Iterable[Snapshot], *, shard_size: int = 256
) -> int:
    """Writes snapshots as shards of ``shard_size``; only one shard is ever held in memory.

    The index is written last, so that an interrupted data set is never taken for a whole one.

    Args:
        folder: made where missing; must not hold a data set yet.
        snapshots: at least one; all of the same widths and types.
        shard_size: snapshots per file.

    Returns:
        How many were written.

    Raises:
        DataError: there is a data set already, there are no snapshots, they do not fit together,
            or the folder cannot be written.
    """
    folder = Path(folder)
    if (folder / INDEX_FILE).exists():
        raise DataError(f"{folder}: holds snapshots already; choose another folder")
    if shard_size < 1:
        raise DataError(f"shard_size is {shard_size}, expected at least 1")
    shards: list[dict[str, Any]] = []
    pending: list[Snapshot] = []
    layout: dict[str, Any] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, snapshot in enumerate(snapshots):
            found = _layout(snapshot, number)
            layout = layout or found
            if found != layout:
                raise DataError(
                    f"snapshot {number} has other widths or types than the first: "
                    f"{_difference(found, layout)}"
                )
            pending.append(snapshot)
            if len(pending) == shard_size:
                shards.append(_write_shard(folder, len(shards), pending))
                pending = []
        if pending:
            shards.append(_write_shard(folder, len(shards), pending))
        if not shards:
            raise DataError(f"{folder}: there are no snapshots to write")
        index = {"format": FORMAT, "version": FORMAT_VERSION, "layout": layout, "shards": shards}
        part = folder / f"{INDEX_FILE}.part"
        part.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        part.replace(folder / INDEX_FILE)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder}: cannot be written: {error}; choose another folder") from None
    return sum(shard["count"] for shard in shards)


class SnapshotDataset:
    """The snapshots of a folder, read one shard at a time.

    Args:
        folder: what :func:`write_snapshots` wrote.

    Raises:
        DataError: the folder holds no data set, or one of another format.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        index = _read_index(self.folder / INDEX_FILE)
        self.layout: dict[str, Any] = index["layout"]
        self._files = [self.folder / shard["file"] for shard in index["shards"]]
        counts: list[int] = [shard["count"] for shard in index["shards"]]
        self._bounds: list[int] = [0, *accumulate(counts)]
        self._open_shard: tuple[int, list[Snapshot]] | None = None

    def __len__(self) -> int:
        return self._bounds[-1]

    def __getitem__(self, index: int) -> Snapshot:
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"snapshot {index} of {len(self)}")
        shard = bisect_right(self._bounds, number) - 1
        return self.shard(shard)[number - self._bounds[shard]]

    @property
    def shard_bounds(self) -> tuple[int, ...]:
        """First snapshot of each shard, and the number of all."""
        return tuple(self._bounds)

    def shard(self, number: int) -> list[Snapshot]:
        """All snapshots of one shard; the newest shard read is kept."""
        if self._open_shard is None or self._open_shard[0] != number:
            expected = self._bounds[number + 1] - self._bounds[number]
            self._open_shard = (number, _read_shard(self._files[number], expected))
        return self._open_shard[1]


def _write_shard(folder: Path, number: int, snapshots: list[Snapshot]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    for name in FIELDS:
        values = [getattr(snapshot, name) for snapshot in snapshots]
        tensors[name] = torch.stack(values) if group_of(name) is None else torch.cat(values)
    for group in _GROUPS:
        first = next(name for name in FIELDS if group_of(name) == group)
        counts = [len(getattr(snapshot, first)) for snapshot in snapshots]
        tensors[f"{group}_counts"] = torch.tensor(counts, dtype=torch.int64)
    name = f"shard-{number:05d}.safetensors"
    part = folder / f"{name}.part"
    save_file({key: value.contiguous() for key, value in tensors.items()}, part)
    part.replace(folder / name)
    return {"file": name, "count": len(snapshots)}


def _read_shard(path: Path, expected: int) -> list[Snapshot]:
    names = (*FIELDS, *(f"{group}_counts" for group in _GROUPS))
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name).clone() for name in names}
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: not a whole shard: {error}; write the data set again") from None
    pieces: dict[str, Sequence[Tensor]] = {}
    for name in FIELDS:
        group = group_of(name)
        if group is None:
            pieces[name] = tensors[name].unbind()
            continue
        counts: list[int] = tensors[f"{group}_counts"].tolist()
        if sum(counts) != len(tensors[name]) or min(counts, default=0) < 0:
            raise DataError(f"{path}: counts of {name!r} do not fit; write the data set again")
        pieces[name] = tensors[name].split(counts)
    if any(len(values) != expected for values in pieces.values()):
        raise DataError(f"{path}: does not hold {expected} snapshots; write the data set again")
    columns = [pieces[name] for name in FIELDS]
    return [Snapshot(*values) for values in zip(*columns, strict=True)]


def _read_index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the folder of a snapshot data set") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; write the data set again") from None
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DataError(f"{path}: is not the index of a snapshot data set")
    if index.get("version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: has format version {index.get('version')!r}, this program reads "
            f"{FORMAT_VERSION}; write the data set again"
        )
    return index


def _layout(snapshot: Snapshot, number: int) -> dict[str, Any]:
    counts: dict[str, int] = {}
    layout: dict[str, Any] = {}
    for name in FIELDS:
        value: Tensor = getattr(snapshot, name)
        group = group_of(name)
        if (group is None) != (value.ndim == 0):
            raise DataError(f"snapshot {number}: {name} has shape {tuple(value.shape)}")
        if group is not None and counts.setdefault(group, len(value)) != len(value):
            raise DataError(
                f"snapshot {number}: {name} has {len(value)} rows, expected {counts[group]}"
            )
        layout[name] = [str(value.dtype).removeprefix("torch."), *value.shape[1:]]
    return layout


def _difference(found: dict[str, Any], layout: dict[str, Any]) -> str:
    name = next(name for name in FIELDS if found[name] != layout[name])
    return f"{name} is {found[name]}, expected {layout[name]}"
