"""Replays snapshots in a seeded order, padded into batches; stops and resumes anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacontext.errors import DataError
from megacontext.lensnet.inputs import CacheFeatures, EntryFeatures, TailStates
from megacontext.lensnet.snapshots import FIELDS, Snapshot, SnapshotDataset, group_of


@dataclass(frozen=True)
class SnapshotBatch:
    """Snapshots padded to the longest: ``b`` snapshots, ``n`` entries, ``m`` cache items.

    Floating tensors are float32.

    Attributes:
        entries: what LensNet reads of the working entries.
        cache: what it reads of the gist cache.
        tail: what it reads of the tail, padded in front, so that the newest token is last.
        entry_levels: int64 ``[b, n]``, 0 on padding.
        entry_starts: int64 ``[b, n]``, 0 on padding.
        entry_utility: ``[b, n]``, NaN on padding and where none was measured.
        cache_levels: int64 ``[b, m]``, 0 on padding.
        cache_starts: int64 ``[b, m]``, 0 on padding.
        cache_utility: ``[b, m]``, NaN on padding and where none was measured.
        cache_evidence: ``[b, m]``, 1 or 0, NaN on padding and where neither is known.
        cursor: int64 ``[b]``.
        tail_start: int64 ``[b]``.
    """

    entries: EntryFeatures
    cache: CacheFeatures
    tail: TailStates
    entry_levels: Tensor
    entry_starts: Tensor
    entry_utility: Tensor
    cache_levels: Tensor
    cache_starts: Tensor
    cache_utility: Tensor
    cache_evidence: Tensor
    cursor: Tensor
    tail_start: Tensor


def collate(snapshots: Sequence[Snapshot]) -> SnapshotBatch:
    """Pads snapshots into one batch with masks.

    Raises:
        DataError: there are none.
    """
    if not snapshots:
        raise DataError("a batch needs at least one snapshot")
    padded: dict[str, Tensor] = {}
    for name in FIELDS:
        values: list[Tensor] = [getattr(snapshot, name) for snapshot in snapshots]
        padded[name] = torch.stack(values) if group_of(name) is None else _pad(name, values)
    entries = EntryFeatures(
        vectors=padded["entry_vectors"],
        features=padded["entry_features"],
        mask=_mask([len(snapshot.entry_levels) for snapshot in snapshots]),
        can_expand=padded["entry_can_expand"],
        can_collapse=padded["entry_can_collapse"],
    )
    cache = CacheFeatures(
        vectors=padded["cache_vectors"],
        features=padded["cache_features"],
        mask=_mask([len(snapshot.cache_levels) for snapshot in snapshots]),
    )
    tail_mask = _mask([len(snapshot.tail_hidden) for snapshot in snapshots])
    kept = {name: padded[name] for name in SnapshotBatch.__dataclass_fields__ if name in padded}
    return SnapshotBatch(
        entries, cache, TailStates(padded["tail_hidden"], tail_mask.flip(1)), **kept
    )


class SnapshotLoader:
    """Batches of a data set, epoch after epoch, in an order that only seed and epoch decide.

    Shuffling goes through the shards in random order and through each shard in random order, so
    that one shard at a time is in memory. Iterating gives the batches that are left of the current
    epoch and then moves on to the next one.

    Args:
        dataset: the snapshots.
        batch_size: snapshots per batch.
        seed: decides the order.
        shuffle: replay in stored order if off.
        drop_last: leave out an epoch's last batch where it is smaller.

    Raises:
        DataError: the batch size is not positive, or no batch would be left.
    """

    def __init__(
        self,
        dataset: SnapshotDataset,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
    ) -> None:
        if batch_size < 1 or seed < 0:
            raise DataError(f"batch_size {batch_size} and seed {seed} must be at least 1 and 0")
        if drop_last and len(dataset) < batch_size:
            raise DataError(
                f"{dataset.folder}: {len(dataset)} snapshots do not fill a batch of {batch_size}; "
                "lower batch_size or keep the last batch"
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.epoch = 0
        self.batch = 0

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[SnapshotBatch]:
        order = self._order(self.epoch)
        while self.batch < len(self):
            first = self.batch * self.batch_size
            chosen = order[first : first + self.batch_size]
            # Counted before it is handed out: a state taken in the loop's body resumes after it.
            self.batch += 1
            yield collate([self.dataset[number] for number in chosen])
        self.epoch += 1
        self.batch = 0

    def state_dict(self) -> dict[str, int | bool]:
        """Where the replay stands, as plain numbers."""
        return {"epoch": self.epoch, "batch": self.batch, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a :meth:`state_dict` of a loader over the same data with the same options.

        Raises:
            DataError: the state belongs to other data or options, or is not a state.
        """
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise DataError(
                    f"the saved replay has {name} {state.get(name)!r}, this one {value!r}; resume "
                    "with the data and options it was started with"
                )
        epoch, batch = state.get("epoch"), state.get("batch")
        if not isinstance(epoch, int) or not isinstance(batch, int):
            raise DataError("the saved replay has no epoch and batch; start the replay anew")
        if epoch < 0 or not 0 <= batch <= len(self):
            raise DataError(f"the saved replay stands at epoch {epoch}, batch {batch}: no such")
        self.epoch, self.batch = epoch, batch

    def _identity(self) -> dict[str, int | bool]:
        return {
            "snapshots": len(self.dataset),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
        }

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.dataset)))
        # One stream per epoch, so that resuming need not replay the epochs before.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        bounds = self.dataset.shard_bounds
        parts: list[Tensor] = []
        for shard in torch.randperm(len(bounds) - 1, generator=generator).tolist():
            count = bounds[shard + 1] - bounds[shard]
            parts.append(bounds[shard] + torch.randperm(count, generator=generator))
        return torch.cat(parts).tolist()


def _pad(name: str, values: list[Tensor]) -> Tensor:
    fill = float("nan") if name.endswith(("_utility", "_evidence")) else 0
    values = [value.float() if value.is_floating_point() else value for value in values]
    side = "left" if name == "tail_hidden" else "right"
    return torch.nn.utils.rnn.pad_sequence(
        values, batch_first=True, padding_value=fill, padding_side=side
    )


def _mask(counts: list[int]) -> Tensor:
    return torch.arange(max(counts)) < torch.tensor(counts)[:, None]
