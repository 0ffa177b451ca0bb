"""Focus policies: what each part of the history is worth for what comes next.

All of them give the same :class:`~megacontext.runtime.focus_scores.FocusScores` and drive the same
allocator, so that a learned lens has honest rivals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_reader import ContextReader
from megacontext.runtime.focus_scores import FocusScores
from megacontext.runtime.working_context import WorkingContext

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class FocusView:
    """What a policy may look at.

    Attributes:
        context: the working context to score.
        memory: the whole history.
        base: the frozen base model.
        reader: reads the context as the base would.
        query: ``[q]`` int64. If the caller gave none, the newest of all tokens, pending ones
            included: the end of prompt and answer if there are any, else of history.
        pending: ``[p]`` int64, tokens behind the cursor which are not in the memory yet.
        asked: whether the query is a question, or holds some of a prompt: somebody waits for an
            answer, and looking may cost more than it may while a text goes on.
        written: how many of the newest pending tokens the model wrote itself, in answer to the
            others.
    """

    context: WorkingContext
    memory: Memory
    base: BaseModel
    reader: ContextReader
    query: Tensor
    pending: Tensor
    asked: bool = False
    written: int = 0

    @property
    def n_proposable(self) -> int:
        """Blocks ``[0, n)`` that may be proposed: before the raw tail, and before the query.

        The query would find itself otherwise.
        """
        context = self.context
        query_start = context.cursor + len(self.pending) - len(self.query)
        return min(context.raw_start, max(0, query_start)) // context.block_size


class FocusPolicy(Protocol):
    """Scores a working context."""

    @property
    def name(self) -> str:
        """Name of the policy, as configs and telemetry give it."""
        ...

    def score(self, view: FocusView) -> FocusScores:
        """Utilities in nats for the entries and for blocks anywhere in the history."""
        ...


class RecencyPolicy:
    """Knows nothing but age: asks for nothing, so that the oldest detail makes room first."""

    name = "recency"

    def score(self, view: FocusView) -> FocusScores:
        """No proposals, and zero for every entry."""
        return FocusScores.unknown(len(view.context))


class LexicalPolicy:
    """BM25 between the query and every block; needs no training.

    A hit lends some of its score to its neighbours, since a statement often crosses a border.

    Args:
        proposals: most blocks to propose.
        nats_per_point: what one point of BM25 score counts as, in nats.
        relative_floor: hits below this share of the best one are left out.
        telling_share: words of the query whose inverse document frequency is below this share of
            the highest one are left out.
        neighbour_share: of a hit's score that the block before it and the one behind it get.
    """

    name = "lexical"

    def __init__(
        self,
        *,
        proposals: int = 8,
        nats_per_point: float = 0.1,
        relative_floor: float = 0.5,
        telling_share: float = 0.5,
        neighbour_share: tuple[float, float] = (0.5, 0.8),
    ) -> None:
        self.proposals = proposals
        self.nats_per_point = nats_per_point
        self.relative_floor = relative_floor
        self.telling_share = telling_share
        self.neighbour_share = neighbour_share

    def score(self, view: FocusView) -> FocusScores:
        """Proposes the best blocks and their neighbours."""
        blocks, utility = self.search(view)
        return proposals_to_scores(view.context, blocks, utility)

    def search(self, view: FocusView) -> tuple[Tensor, Tensor]:
        """Blocks ``[m]`` int64 (each once) and utilities ``[m]`` float32 in nats, best first."""
        n_blocks = view.context.cursor // view.context.block_size
        # Hits that may not be proposed are dropped below, so ask for more than needed.
        words = self._telling(view.memory, view.base.decode(view.query))
        found, points = view.memory.search_blocks(words, self.proposals * 2 + 16)
        old = found < view.n_proposable
        found, points = found[old][: self.proposals], points[old][: self.proposals]
        if not len(found):
            return found, points
        kept = points >= self.relative_floor * points[0]
        found, points = found[kept], points[kept]
        return spread(found, points * self.nats_per_point, self.neighbour_share, n_blocks)

    def _telling(self, memory: Memory, text: str) -> str:
        """The words of a query that tell blocks apart; the rest would drown them."""
        words = sorted(set(_WORD.findall(text)))
        weights = memory.term_weights(words)
        least = self.telling_share * max(weights.values(), default=0.0)
        return " ".join(word for word in words if weights[word] >= least)


class AttentionPolicy:
    """The base model's own attention from the query to the entries; needs no training.

    Args:
        nats_per_mass: what attention mass 1.0 counts as, in nats.
        query_rows: newest rows whose attention is read.
    """

    name = "attention"

    def __init__(self, *, nats_per_mass: float = 20.0, query_rows: int = 16) -> None:
        self.nats_per_mass = nats_per_mass
        self.query_rows = query_rows

    def score(self, view: FocusView) -> FocusScores:
        """An entry is worth what the query's rows attend to it."""
        context = view.context
        if not len(context):
            return FocusScores.unknown(0)
        utility = entry_attention(view, self.query_rows) * self.nats_per_mass
        nothing = torch.empty(0)
        return FocusScores(
            nothing.long(), nothing, utility, utility.masked_fill(context.levels == 0, 0.0)
        )


def spread(
    blocks: Tensor, utility: Tensor, share: tuple[float, float], n_blocks: int
) -> tuple[Tensor, Tensor]:
    """Lends shares of each block's utility to its neighbours: a statement may cross a border.

    Args:
        blocks: ``[m]`` int64.
        utility: ``[m]`` float32, not negative.
        share: what the block before and the block behind get.
        n_blocks: blocks of the history.

    Returns:
        Blocks, each once, and the highest utility of each, best first.
    """
    before, after = share
    each = torch.cat((blocks, blocks - 1, blocks + 1))
    values = torch.cat((utility, utility * before, utility * after))
    inside = (each >= 0) & (each < n_blocks)
    unique, where = torch.unique(each[inside], return_inverse=True)
    best = torch.zeros(len(unique)).scatter_reduce(0, where, values[inside], "amax")
    order = torch.argsort(best, descending=True, stable=True)
    return unique[order], best[order]


def entry_attention(view: FocusView, query_rows: int) -> Tensor:
    """How much of the base model's attention each entry gets from the newest rows.

    Args:
        view: its context has at least one entry.
        query_rows: how many rows ask.

    Returns:
        ``[n]`` float32, mean mass over rows, heads and layers.
    """
    context = view.context
    reading = view.reader.read(context, view.pending)
    mass = view.base.attention_to(reading, min(query_rows, reading.n_rows)).cpu()
    rows, gists = view.reader.split(view.reader.layout(context, len(view.pending)))
    starts = torch.cat((gists.starts, rows.starts))
    told = starts < context.cursor
    return torch.zeros(len(context)).index_add_(0, context.indices_of(starts[told]), mass[told])


def proposals_to_scores(context: WorkingContext, blocks: Tensor, utility: Tensor) -> FocusScores:
    """Scores from proposals alone: a proposed block that is raw already is kept for its utility."""
    entry_utility = torch.zeros(len(context))
    if len(blocks):
        entries = context.indices_of(blocks * context.block_size)
        raw = context.levels[entries] == 0
        entry_utility.scatter_reduce_(0, entries[raw], utility[raw].float(), "amax")
        blocks, utility = blocks[~raw], utility[~raw]
    return FocusScores(blocks, utility.float(), entry_utility, torch.zeros(len(context)))
