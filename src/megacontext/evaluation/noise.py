"""Book text as ready tokens: the noise that statements of a long history stand in."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from megacontext.errors import InputError
from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.runtime.base_model import BaseModel
from megacontext.tasks.corpus import HELD_OUT_EVERY, held_out_documents

# Between two sentences before the spaces, where byte-level BPE never merges across, and before the
# line breaks that end a sentence or a paragraph.
_BETWEEN = re.compile(
    r"""(?:(?<=[.!?])|(?<=[.!?]["'”’)_]))(?<!Mr\.)(?<!Mrs\.)(?<!Dr\.)(?<!St\.)"""
    r"""(?=[ ]{1,2}["'“‘(_]?[A-Z]|\n)|(?<=\S)(?=\n[ \t]*\n)"""
)
_BETWEEN_TEXTS = "\n\n"
_BATCH = 4096


class NoiseTokens:
    """Texts tokenized once, with the places between their sentences.

    Args:
        base: its tokenizer cuts the texts.
        texts: running texts; a text without recognizable sentences counts as one sentence.

    Raises:
        InputError: the texts hold no token.
    """

    def __init__(self, base: BaseModel, texts: Sequence[str]) -> None:
        self.base = base
        parts: list[np.ndarray[Any, Any]] = []
        sizes: list[int] = []
        for text in texts:
            sentences = _sentences(_BETWEEN_TEXTS + text)
            for first in range(0, len(sentences), _BATCH):
                for ids in _encode_batch(base, sentences[first : first + _BATCH]):
                    if ids:
                        parts.append(np.array(ids, dtype=np.int32))
                        sizes.append(len(ids))
        if not parts:
            raise InputError("the noise is empty; name a text file that holds text")
        self._ids = np.concatenate(parts)
        self._starts = np.cumsum([0, *sizes[:-1]])

    @classmethod
    def read(
        cls, base: BaseModel, corpus: Sequence[Path] = (), held_out_every: int = HELD_OUT_EVERY
    ) -> Self:
        """The documents of a corpus that no training has seen; the bundled book without a corpus.

        Args:
            base: its tokenizer cuts the texts.
            corpus: text files, the same and in the same order as the base was trained on.
            held_out_every: every n-th document was held out.

        Raises:
            DataError: a file cannot be read, or there are fewer than ``held_out_every`` documents.
        """
        texts = held_out_documents(corpus, held_out_every) if corpus else [read_book(DemoConfig())]
        return cls(base, texts)

    def __len__(self) -> int:
        """Tokens of all texts."""
        return len(self._ids)

    @property
    def sentence_starts(self) -> Tensor:
        """Index of every sentence's first token, ascending: ``[sentences]`` int64."""
        return torch.from_numpy(self._starts.copy())

    def encode(self, statement: str) -> Tensor:
        """Token ids ``[n]`` int64 of a statement as it stands between two sentences."""
        # As in training: a space before it, unless it starts a line.
        fresh = statement[:1] in ("\n", " ")
        return self.base.encode(statement if fresh else f" {statement}")

    def draw(self, rng: random.Random, tokens: int) -> Tensor:
        """``[tokens]`` int64 of consecutive noise from the start of a random sentence.

        Behind the last text the first one follows, again and again where ``tokens`` is more than
        all of them.
        """
        return self._cut(self._random_start(rng), tokens)

    def splice(
        self,
        rng: random.Random,
        statements: Sequence[Tensor],
        tokens: int,
        *,
        depths: Sequence[float] | None = None,
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        """A history in which statements stand between the sentences of noise, in order.

        Args:
            rng: where the noise starts and, without ``depths``, where the statements stand: all
                sets of places between sentences are equally likely. Only statements that are more
                than the places share some.
            statements: token ids ``[n]`` each, see :meth:`encode`.
            tokens: length of the history.
            depths: how much of the noise comes before each statement, ascending from 0 to 1; the
                statement stands at the nearest place between two sentences.

        Returns:
            The history, ``[tokens]`` int64, and the span ``[start, end)`` of each statement.

        Raises:
            InputError: the statements are longer than the history, or ``depths`` do not fit them.
        """
        sizes = [len(statement) for statement in statements]
        length = tokens - sum(sizes)
        if length < 0:
            raise InputError(
                f"{sum(sizes)} tokens of statements do not fit into a history of {tokens}"
            )
        start = self._random_start(rng)
        gaps = self._gaps(start, length)
        if depths is None:
            places = _random_places(rng, gaps, len(sizes))
        else:
            places = _places_at(gaps, _checked(depths, len(sizes)), length)
        noise = self._cut(start, length)
        parts: list[Tensor] = []
        spans: list[tuple[int, int]] = []
        done = end = 0
        for place, statement, size in zip(places, statements, sizes, strict=True):
            parts += [noise[done:place], statement.long()]
            first = end + place - done
            end = first + size
            spans.append((first, end))
            done = place
        parts.append(noise[done:])
        return torch.cat(parts), spans

    def _random_start(self, rng: random.Random) -> int:
        return int(self._starts[rng.randrange(len(self._starts))])

    def _cut(self, start: int, tokens: int) -> Tensor:
        """``[tokens]`` int64 from token ``start`` on, going round."""
        noise = np.empty(tokens, dtype=np.int64)
        done = 0
        while done < tokens:
            part = self._ids[start : start + tokens - done]
            noise[done : done + len(part)] = part
            done += len(part)
            start = 0
        return torch.from_numpy(noise)

    def _gaps(self, start: int, tokens: int) -> np.ndarray[Any, Any]:
        """Where a sentence begins within ``tokens`` of noise from ``start`` on, ascending."""
        total = len(self._ids)
        first = int(np.searchsorted(self._starts, start))
        turn = np.concatenate((self._starts[first:], self._starts[:first] + total)) - start
        rounds = tokens // total + 1
        gaps = (turn + total * np.arange(rounds)[:, None]).ravel()
        return gaps[: np.searchsorted(gaps, tokens, side="left")] if tokens else gaps[:1]


def _sentences(text: str) -> list[str]:
    """A text cut between its sentences; joined, the parts are the text."""
    cuts = [0, *(match.start() for match in _BETWEEN.finditer(text)), len(text)]
    return [text[a:b] for a, b in pairwise(cuts)]


def _encode_batch(base: BaseModel, texts: list[str]) -> list[list[int]]:
    """Token ids of many texts, without special tokens."""
    encoded = base.tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    )
    return encoded["input_ids"]


def _checked(depths: Sequence[float], count: int) -> Sequence[float]:
    if len(depths) != count:
        raise InputError(f"{len(depths)} depths for {count} statements; give one for each")
    if list(depths) != sorted(depths) or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"depths are {list(depths)}, expected ascending numbers from 0 to 1")
    return depths


def _random_places(rng: random.Random, gaps: np.ndarray[Any, Any], count: int) -> list[int]:
    if count <= len(gaps):
        chosen = sorted(rng.sample(range(len(gaps)), count))
    else:
        chosen = sorted(rng.choices(range(len(gaps)), k=count))
    return gaps[chosen].tolist()


def _places_at(gaps: np.ndarray[Any, Any], depths: Sequence[float], tokens: int) -> list[int]:
    """The place between sentences nearest to each depth."""
    wanted = np.asarray(depths, dtype=np.float64) * tokens
    after = np.searchsorted(gaps, wanted).clip(0, len(gaps) - 1)
    before = (after - 1).clip(0)
    nearer = np.abs(gaps[before] - wanted) <= np.abs(gaps[after] - wanted)
    return np.where(nearer, gaps[before], gaps[after]).tolist()
