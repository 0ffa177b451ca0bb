"""Batches for training GistNet: generated rows and prepared slices, some blocks read as gists."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megacontext.config import FrozenConfig
from megacontext.errors import DataError
from megacontext.training.gist_objective import GistBatch
from megacontext.training.lm_batches import MixtureConfig, RowSampler
from megacontext.training.prepared_dataset import PreparedDataset

_ROWS_PER_STEP = 4096


class GistPhase(FrozenConfig):
    """A stretch of the curriculum.

    Attributes:
        length: tokens of a window, whole blocks.
        rows: windows of a batch, on each device.
        steps: optimizer steps.
        replaced: numbers of blocks read as level-1 gists; each step draws one of them.
        slots: numbers of entries that gists are read as; each step draws one of them. Empty: all
            they have.
        spans: level-2 spans at the beginning of the window that are read as one gist each.
        keep_last: blocks at the end that stay raw.
        run_share: share of windows in which the replaced blocks are neighbours; in the others they
            are anywhere.
        mixture: of the texts, if not that of the run.
    """

    length: int = Field(ge=64)
    rows: int = Field(ge=1, le=4096)
    steps: int = Field(ge=1)
    replaced: tuple[int, ...] = Field(default=(1,), min_length=1)
    slots: tuple[int, ...] = ()
    spans: int = Field(default=0, ge=0)
    keep_last: int = Field(default=1, ge=1)
    run_share: float = Field(default=0.5, ge=0, le=1)
    mixture: MixtureConfig | None = None

    @model_validator(mode="after")
    def _something_is_replaced(self) -> Self:
        if min(self.replaced) < 0 or (not self.spans and 0 in self.replaced):
            raise ValueError(f"replaced is {self.replaced}, expected at least 1 (0 with spans)")
        return self

    def check(self, block_size: int) -> None:
        """Refuses what does not fit blocks of ``block_size`` tokens.

        Raises:
            ValueError: says what.
        """
        if self.length % block_size:
            raise ValueError(f"length {self.length} is not a multiple of {block_size} tokens")
        free = self.length // block_size - self.keep_last - self.spans * block_size
        if max(self.replaced) > free:
            raise ValueError(
                f"replaced is {max(self.replaced)}, but a window of {self.length} tokens with "
                f"{self.spans} spans and {self.keep_last} blocks kept has room for {free}"
            )


@dataclass(frozen=True)
class GistStep:
    """What the batch of one step is made of.

    Attributes:
        phase: its phase.
        sampler: draws generated rows.
    """

    phase: GistPhase
    sampler: RowSampler


class GistRows(Dataset[GistBatch]):
    """Batches by step; each is a function of the seed, the step and the process alone.

    Args:
        plan: what every step is made of.
        block_size: tokens of a block.
        seed: of the patterns.
        prepared: slices whose teacher states are at hand; all with states.
        prepared_share: share of batches that come from them.
        rank: number of this process.
        world: how many processes train together.
        first: step at which index 0 stands.
    """

    def __init__(
        self,
        plan: Sequence[GistStep],
        *,
        block_size: int,
        seed: int,
        prepared: Sequence[PreparedDataset] = (),
        prepared_share: float = 0.0,
        rank: int = 0,
        world: int = 1,
        first: int = 0,
    ) -> None:
        self.plan = plan
        self.block_size = block_size
        self.seed = seed
        self.prepared = prepared
        self.prepared_share = prepared_share if prepared else 0.0
        self.rank = rank
        self.world = world
        self.first = first

    def __len__(self) -> int:
        return len(self.plan) - self.first

    def __getitem__(self, index: int) -> GistBatch:
        step = self.first + index
        phase, sampler = self.plan[step].phase, self.plan[step].sampler
        rng = random.Random(f"gists/{self.seed}/{step}/{self.rank}")
        # Drawn alike in every process, so that all compute windows of the same shape.
        shared = random.Random(f"gists/{self.seed}/{step}")
        replaced = shared.choice(phase.replaced)
        slots = shared.choice(phase.slots) if phase.slots else None
        levels = torch.stack([self._levels(rng, phase, replaced) for _ in range(phase.rows)])
        if shared.random() < self.prepared_share:
            return self._from_slices(rng, phase, levels, slots)
        number = (step * self.world + self.rank) * _ROWS_PER_STEP
        drawn = [sampler.row(number + row, phase.length) for row in range(phase.rows)]
        return GistBatch(
            _stacked([ids for ids, _ in drawn]), _stacked([w for _, w in drawn]), levels, slots
        )

    def _levels(self, rng: random.Random, phase: GistPhase, replaced: int) -> Tensor:
        blocks, deep = phase.length // self.block_size, phase.spans * self.block_size
        levels = torch.zeros(blocks, dtype=torch.int64)
        levels[:deep] = 2
        last = blocks - phase.keep_last
        if rng.random() < phase.run_share:
            start = rng.randint(deep, last - replaced)
            levels[start : start + replaced] = 1
        else:
            levels[rng.sample(range(deep, last), replaced)] = 1
        return levels

    def _from_slices(
        self, rng: random.Random, phase: GistPhase, levels: Tensor, slots: int | None
    ) -> GistBatch:
        ids: list[Tensor] = []
        states: list[Tensor] = []
        while len(ids) < phase.rows:
            dataset = rng.choice(self.prepared)
            piece = dataset[rng.randrange(len(dataset))]
            if piece.teacher_states is None or int(piece.context_mask.sum()) < phase.length:
                continue
            ids.append(piece.context_tokens[: phase.length])
            recipe = dataset.manifest.recipe.teacher
            # The final states have the highest number, wherever they stand.
            final = recipe.layers.index(max(recipe.layers)) if recipe else -1
            states.append(piece.teacher_states[final, : phase.length].float())
        weights = torch.ones(phase.rows, phase.length)
        return GistBatch(torch.stack(ids), weights, levels, slots, torch.stack(states))


def check_prepared(dataset: PreparedDataset, phases: Sequence[GistPhase], final_layer: int) -> None:
    """Refuses slices that the phases cannot use.

    Args:
        dataset: the slices.
        phases: the curriculum.
        final_layer: number of the base's final states, which is that of its layers.

    Raises:
        DataError: they have no final teacher states, or no slice is as long as a phase's windows.
    """
    longest = max(phase.length for phase in phases)
    teacher = dataset.manifest.recipe.teacher
    if teacher is None:
        raise DataError(
            f"{dataset.folder}: has no teacher states; prepare it with `teacher.enabled: true`"
        )
    if final_layer not in teacher.layers:
        raise DataError(
            f"{dataset.folder}: has the teacher's states {list(teacher.layers)}, not the final "
            f"ones ({final_layer}); prepare it with -1 among `teacher.layers`"
        )
    if not any(int(dataset[i].context_mask.sum()) >= longest for i in range(len(dataset))):
        raise DataError(
            f"{dataset.folder}: no slice holds {longest} tokens, the longest phase; raise "
            "`slices.context_tokens` or shorten the phases"
        )


def gist_batches(rows: GistRows, *, workers: int = 1) -> Iterator[GistBatch]:
    """The batches of ``rows`` in order, built ahead by ``workers`` processes (0: by this one)."""
    yield from DataLoader(
        rows, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None
    )


def _stacked(arrays: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
