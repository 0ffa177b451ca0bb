"""Batches for training the base model: prose and generated recall tasks, weighted by token."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from tokenizers import Tokenizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megacontext.config import FrozenConfig
from megacontext.errors import DataError
from megacontext.tasks.corpus import END_OF_TEXT, read_documents, split_corpus
from megacontext.tasks.documents import RELATIONS, Piece, PieceKind, WorldFact
from megacontext.tasks.recall_documents import Prose, RecallDocuments

__all__ = [
    "END_OF_TEXT",
    "LMBatch",
    "MixtureConfig",
    "PlannedStep",
    "RowSampler",
    "batches",
    "read_documents",
    "split_corpus",
]

_ROWS_PER_STEP = 4096


class MixtureConfig(FrozenConfig):
    """Shares of a training row (they are normalised) and loss weights of its tokens."""

    prose_share: float = Field(default=0.25, ge=0, allow_inf_nan=False)
    recall_share: float = Field(default=0.65, ge=0, allow_inf_nan=False)
    copy_share: float = Field(default=0.10, ge=0, allow_inf_nan=False)
    prose_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    statement_weight: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    answer_weight: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    statement_share: float = Field(
        default=0.25, gt=0, le=1, description="share of statement tokens that are scored at all"
    )
    story_share: float = Field(
        default=0.45, ge=0, lt=1, description="share of the recall documents that tell a story"
    )
    state_labels: int = Field(
        default=0, ge=0, description="facts of a story's world asked after each of its sentences"
    )
    shortest_document: int = Field(default=48, ge=16, description="tokens")
    longest_document: int = Field(default=0, ge=0, description="tokens; 0: as long as the row")

    @model_validator(mode="after")
    def _has_a_share(self) -> Self:
        if self.prose_share + self.recall_share + self.copy_share == 0:
            raise ValueError("prose_share, recall_share and copy_share must not all be 0")
        return self


@dataclass(frozen=True)
class LMBatch:
    """One training batch.

    Args:
        ids: ``[batch, length]`` int64 token ids.
        weights: ``[batch, length]`` float32; the loss weight of predicting this very token.
        states: ``[n, 5]`` int64; facts that hold in a story's world at a token: row, position,
            number of the relation, first token of the entity and first token of the value.
    """

    ids: Tensor
    weights: Tensor
    states: Tensor


class RowSampler:
    """Builds training rows; a row is a pure function of the seed and its number.

    Args:
        tokenizer: byte-level tokenizer with ``<|endoftext|>``.
        prose: training texts.
        mixture: shares and weights.
        seed: seed of the whole run.
        end: the token between documents.

    Raises:
        DataError: the tokenizer has no such token.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prose: Prose,
        mixture: MixtureConfig,
        seed: int,
        end: str = END_OF_TEXT,
    ) -> None:
        self.tokenizer = tokenizer
        self.prose = prose
        self.mixture = mixture
        self.seed = seed
        self.end = end
        end_id = tokenizer.token_to_id(end)
        if end_id is None:
            raise DataError(f"the tokenizer has no token {end}; train one with this package")
        self.end_id = end_id
        self._weights = {
            "prose": mixture.prose_weight,
            "statement": mixture.statement_weight,
            "question": mixture.statement_weight,
            "answer": mixture.answer_weight,
            "copy": 1.0,
        }

    def with_mixture(self, mixture: MixtureConfig) -> RowSampler:
        """The same sampler with other shares and weights."""
        return RowSampler(self.tokenizer, self.prose, mixture, self.seed, self.end)

    def row(self, number: int, length: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Token ids and weights, each ``[length]``, of row ``number``."""
        return self.row_with_states(number, length)[:2]

    def row_with_states(
        self, number: int, length: int
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], list[list[int]]]:
        """As :meth:`row`, and the facts that hold at the ends of story sentences.

        Each fact is four numbers: position, relation, first token of the entity and of the value.
        """
        rng = random.Random(f"{self.seed}/{number}")
        recall = RecallDocuments(rng, self.prose, story_share=self.mixture.story_share)
        ids: list[int] = []
        weights: list[float] = []
        states: list[list[int]] = []
        while len(ids) < length:
            room = length - len(ids)
            pieces = self._document(rng, recall, room)
            for piece, (text_ids, weight) in zip(pieces, self.encode(pieces), strict=True):
                ids += text_ids
                weights += self._token_weights(rng, piece.kind, weight, len(text_ids))
                if self.mixture.state_labels and piece.facts and len(ids) <= length:
                    states += self._states(rng, piece.facts, len(ids) - 1)
            ids.append(self.end_id)
            weights.append(self.mixture.statement_weight)
        return (
            np.array(ids[:length], dtype=np.int64),
            np.array(weights[:length], dtype=np.float32),
            states,
        )

    def _states(
        self, rng: random.Random, facts: Sequence[WorldFact], position: int
    ) -> list[list[int]]:
        """A sample of facts as numbers; ``position`` is the last token of their sentence."""
        chosen = rng.sample(facts, min(self.mixture.state_labels, len(facts)))
        texts = [f" {word}" for _, entity, value in chosen for word in (entity, value)]
        first = [encoding.ids[0] for encoding in self.tokenizer.encode_batch_fast(texts)]
        return [
            [position, RELATIONS.index(relation), first[2 * i], first[2 * i + 1]]
            for i, (relation, _, _) in enumerate(chosen)
        ]

    def encode(self, pieces: Sequence[Piece]) -> Iterator[tuple[list[int], float]]:
        """Token ids and loss weight of every piece."""
        encodings = self.tokenizer.encode_batch_fast([piece.text for piece in pieces])
        for piece, encoding in zip(pieces, encodings, strict=True):
            yield encoding.ids, self._weights[piece.kind]

    def _token_weights(
        self, rng: random.Random, kind: PieceKind, weight: float, count: int
    ) -> list[float]:
        """Weights of a piece; statements are scored in a sample, since the output layer is dear."""
        share = self.mixture.statement_share
        if kind not in ("statement", "question") or share == 1.0:
            return [weight] * count
        return [weight / share if rng.random() < share else 0.0 for _ in range(count)]

    def _document(self, rng: random.Random, recall: RecallDocuments, room: int) -> list[Piece]:
        mixture = self.mixture
        kind = rng.choices(
            ("prose", "recall", "copy"),
            weights=(mixture.prose_share, mixture.recall_share, mixture.copy_share),
        )[0]
        shortest = mixture.shortest_document
        room = min(room, mixture.longest_document or room)
        size = room
        if room > 2 * shortest:
            # Log-uniform: as many short, dense documents as long ones.
            size = int(shortest * (room / shortest) ** rng.random())
        if kind == "copy":
            return recall.copy(min(size, 160))
        if kind == "prose":
            return [Piece(self.prose.slice(rng, size * 4), "prose")]
        return recall.draw(int(size * 0.95))


@dataclass(frozen=True)
class PlannedStep:
    """What the batch of one training step is made of."""

    rows: int
    length: int
    sampler: RowSampler


class _Rows(Dataset[LMBatch]):
    """Batch ``step`` of a run in which every phase has its own rows."""

    def __init__(self, plan: Sequence[PlannedStep], first: int) -> None:
        self.plan = plan
        self.first = first

    def __len__(self) -> int:
        return len(self.plan) - self.first

    def __getitem__(self, index: int) -> LMBatch:
        step = self.first + index
        planned = self.plan[step]
        drawn = [
            planned.sampler.row_with_states(step * _ROWS_PER_STEP + row, planned.length)
            for row in range(planned.rows)
        ]
        ids, weights, states = zip(*drawn, strict=True)
        labels = [[row, *label] for row, labels in enumerate(states) for label in labels]
        return LMBatch(
            torch.from_numpy(np.stack(ids)),
            torch.from_numpy(np.stack(weights)),
            torch.tensor(labels, dtype=torch.int64).reshape(-1, 5),
        )


def batches(plan: Sequence[PlannedStep], *, first: int = 0, workers: int = 1) -> Iterator[LMBatch]:
    """Batches for the steps ``first`` onward of ``plan``.

    Args:
        plan: what every step of the run is made of.
        first: the step to begin with; at most ``len(plan)``.
        workers: processes that build batches ahead; 0 builds them in this one.
    """
    rows = _Rows(plan, first)
    yield from DataLoader(
        rows, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None
    )
