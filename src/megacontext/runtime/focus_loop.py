"""Keeps one working context in step with a growing history: room, scores, edits, records."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megacontext.errors import InputError, InvariantError
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_reader import ContextReader
from megacontext.runtime.focus_allocator import FocusAllocator
from megacontext.runtime.focus_metrics import FocusMeter
from megacontext.runtime.focus_policies import FocusPolicy, FocusView
from megacontext.runtime.focus_scores import AllocatorState, Edit, FocusPlan, FocusScores
from megacontext.runtime.held_scores import HeldScores
from megacontext.runtime.reading import KVMode, is_edited
from megacontext.runtime.working_context import WorkingContext
from megacontext.telemetry import Span, Telemetry

FocusReason = Literal["decode", "stream", "request"]

_TOP_SCORES = 16


@dataclass(frozen=True)
class FocusRecord:
    """What one refocus saw and did, for :meth:`Engine.explain` and for the playback.

    Attributes:
        round: number of the refocus.
        cursor: tokens of history.
        policy: name of the policy.
        spans: ``[n, 3]`` int64: level, start, end of every entry afterwards.
        proposals: ``(block, nats)`` of the best proposals.
        edits: what was changed.
        cost: token-equivalents afterwards.
    """

    round: int
    cursor: int
    policy: str
    spans: Tensor
    proposals: tuple[tuple[int, float], ...]
    edits: tuple[Edit, ...]
    cost: int


class FocusLoop:
    """The working context of one session.

    Args:
        base: the frozen base model.
        memory: the history.
        reader: lays contexts out for the base.
        policy: scores.
        allocator: edits.
        telemetry: told of every refocus.
        budget: ``W``.
        tail_tokens: newest tokens that stay raw.
        asked_tail_tokens: the same for a question of its own, if that is less.
        gist_cost: ``S``.
        query_tokens: how many of the newest tokens ask.
        keep_records: how many records to keep.
        kv: what the base computes again after an edit, for telemetry.
    """

    def __init__(
        self,
        base: BaseModel,
        memory: Memory,
        reader: ContextReader,
        policy: FocusPolicy,
        allocator: FocusAllocator,
        telemetry: Telemetry,
        *,
        budget: int,
        tail_tokens: int,
        gist_cost: int,
        query_tokens: int,
        keep_records: int,
        asked_tail_tokens: int | None = None,
        kv: KVMode = "exact",
    ) -> None:
        self.base = base
        self.memory = memory
        self.reader = reader
        self.policy = policy
        self.allocator = allocator
        self.telemetry = telemetry
        self.query_tokens = query_tokens
        self.asked_tail_tokens = (
            tail_tokens if asked_tail_tokens is None else min(asked_tail_tokens, tail_tokens)
        )
        self.kv: KVMode = kv
        self.context = WorkingContext.initial(
            memory.n_tokens,
            block_size=memory.identity.block_size,
            gist_cost=gist_cost,
            budget=budget,
            tail_tokens=tail_tokens,
        )
        self.state = AllocatorState.initial()
        self.meter = FocusMeter()
        self.records: deque[FocusRecord] = deque(maxlen=keep_records)
        self._held: HeldScores | None = None

    def advance(self, cursor: int, reserve: int = 0) -> None:
        """Moves the cursor to ``cursor``; what no longer fits collapses, oldest first.

        Raises:
            InputError: the memory holds fewer tokens, or the cursor would move back.
        """
        context = self.context
        if not context.cursor <= cursor <= self.memory.n_tokens:
            raise InputError(
                f"cannot move the cursor from {context.cursor} to {cursor}; the memory holds "
                f"{self.memory.n_tokens} tokens and history only grows"
            )
        if cursor - context.cursor > context.budget:
            # Everything raw so far leaves the window anyway: start from the coarsest tiling.
            context = _coarsest(context, cursor)
        else:
            context = context.extend(cursor - context.cursor)
        if context.cost > context.budget - reserve:
            context = self._make_room(context, reserve).context
        self.context = context

    def refocus(
        self,
        pending: Tensor,
        *,
        asking: int = 0,
        query: Tensor | None = None,
        written: int = 0,
        settled: bool = False,
        reserve: int = 0,
        reason: FocusReason = "request",
        cached: WorkingContext | None = None,
    ) -> FocusPlan:
        """One round of scores and edits.

        Args:
            pending: ``[p]`` int64, tokens behind the cursor that the model reads as well.
            asking: how many of the newest tokens, pending or not, are prompt and answer; 0: the
                pending ones. At most ``query_tokens`` of them ask; without any, history does.
            query: ``[q]`` int64, tokens that ask instead of those.
            written: how many of the newest pending tokens are answer.
            settled: whether the last look was for the same, and what was written since tells
                nothing new. While somebody asks, what was found then holds: nothing is scored,
                what is open stays open, and only room is made.
            reserve: token-equivalents to keep free for pending and coming tokens.
            reason: why, for telemetry; only after ``decode`` the base reads the outcome.
            cached: the context whose keys and values are known, for telemetry; none if ``None``.

        Raises:
            ConfigError: even the coarsest context leaves too little room.
        """
        started = time.perf_counter()
        before = self.context
        room: tuple[Edit, ...] = ()
        if before.cost + len(pending) > self.reader.max_positions:
            # A policy may read the context, and this one is too long for the base to read.
            made = self._make_room(before, reserve)
            self.context, room = made.context, made.edits
        scores = self._scores(self.view(pending, asking, query, written), settled=settled)
        scored = time.perf_counter()
        plan = self.allocator.plan(self.context, scores, self.state, reserve)
        plan = replace(plan, edits=room + plan.edits)
        self.meter.observe(before, plan)
        self.context, self.state = plan.context, plan.state
        record = FocusRecord(
            round=plan.state.round,
            cursor=before.cursor,
            policy=self.policy.name,
            spans=plan.context.spans(),
            proposals=_best(scores),
            edits=plan.edits,
            cost=plan.context.cost,
        )
        self.records.append(record)
        recomputed = self._recomputed(cached, pending) if reason == "decode" else 0
        self._report(record, plan, recomputed, (scored - started) * 1000, started, reason)
        return plan

    def mark(self) -> tuple[WorkingContext, AllocatorState]:
        """Where the focus stands, for :meth:`return_to`."""
        return self.context, self.state

    def start_over(self) -> None:
        """Collapses to the coarsest legal tiling, for a question of its own; the records stay."""
        context = replace(self.context, tail_tokens=self.asked_tail_tokens)
        self.context = _coarsest(context, context.cursor)

    def return_to(self, mark: tuple[WorkingContext, AllocatorState]) -> None:
        """Takes back the edits since a mark; rounds go on counting, so that records stay apart.

        Raises:
            InvariantError: the history has grown since.
        """
        context, state = mark
        if context.cursor != self.context.cursor:
            raise InvariantError(
                f"the focus stood at token {context.cursor} and is now at {self.context.cursor}; "
                "edits behind a history that has grown cannot be taken back"
            )
        passed = self.state.round - state.round
        self.context = context
        self.state = replace(state, round=self.state.round, rounds=state.rounds + passed)

    def view(
        self, pending: Tensor, asking: int = 0, query: Tensor | None = None, written: int = 0
    ) -> FocusView:
        """What the policy may look at now; see :meth:`refocus`."""
        # A long answer goes on like any text: its beginning no longer asks.
        asked = query is not None or written < min(asking, self.query_tokens)
        if query is None:
            cursor = self.context.cursor
            wanted = min(asking or len(pending) or self.query_tokens, self.query_tokens)
            query = pending[max(0, len(pending) - wanted) :]
            if len(query) < wanted:
                start = max(0, cursor + len(pending) - wanted)
                query = torch.cat((self.memory.tokens(start, cursor).long(), query))
        return FocusView(
            self.context,
            self.memory,
            self.base,
            self.reader,
            query,
            pending,
            asked=asked,
            written=min(written, len(pending)),
        )

    def _scores(self, view: FocusView, *, settled: bool) -> FocusScores:
        if settled and view.asked and self._held is not None:
            return self._held.scores(view.context)
        scores = self.policy.score(view)
        self._held = HeldScores(view.context, scores)
        return scores

    def _make_room(self, context: WorkingContext, reserve: int) -> FocusPlan:
        unknown = FocusScores.unknown(len(context))
        return self.allocator.make_room(context, unknown, self.state, reserve)

    def _recomputed(self, cached: WorkingContext | None, pending: Tensor) -> int:
        """Rows to compute: from the first changed entry on, or in ``incremental`` the new ones."""
        context = self.context
        if cached is not None and not is_edited(cached, context):
            return 1  # what stands behind it was read token by token
        anew = torch.ones(len(context), dtype=torch.bool)
        if cached is not None and self.kv == "incremental":
            anew = ~torch.isin(context.keys, cached.keys)
        elif cached is not None:
            n = min(len(cached), len(context))
            equal = (cached.spans()[:n] == context.spans()[:n]).all(dim=1)
            anew[: int(equal.cumprod(dim=0).sum())] = False
        if self.reader.gistnet.config.reader == "kv":
            anew &= context.levels == 0
        return int(context.costs[anew].sum()) + len(pending)

    def _report(
        self,
        record: FocusRecord,
        plan: FocusPlan,
        recomputed: int,
        score_ms: float,
        started: float,
        reason: FocusReason,
    ) -> None:
        if not self.telemetry.enabled:
            return
        generation, size = self.memory.generation, self.memory.identity.block_size
        self.telemetry.score(
            generation=generation,
            policy=record.policy,
            entries=len(plan.context),
            spans=[Span(0, block * size, (block + 1) * size) for block, _ in record.proposals],
            scores=[score for _, score in record.proposals],
            ms=score_ms,
        )
        for edit in record.edits:
            parent = [Span(edit.level, edit.start, edit.end)]
            children = _children(edit, size)
            expand = edit.kind == "expand"
            self.telemetry.edit(
                generation=generation,
                action=edit.kind,
                removed=parent if expand else children,
                added=children if expand else parent,
                score=edit.score,
                cost_change=edit.cost_change,
                reason=edit.reason,
            )
        self.telemetry.refocus(
            generation=generation,
            round=record.round,
            policy=record.policy,
            cursor=record.cursor,
            entries=len(plan.context),
            edits=len(plan.edits),
            cost=record.cost,
            budget=plan.context.budget,
            recomputed=recomputed,
            kv=self.kv,
            reason=reason,
            ms=(time.perf_counter() - started) * 1000,
        )


def _coarsest(context: WorkingContext, cursor: int) -> WorkingContext:
    return WorkingContext.initial(
        cursor,
        block_size=context.block_size,
        gist_cost=context.gist_cost,
        budget=context.budget,
        tail_tokens=context.tail_tokens,
    )


def _best(scores: FocusScores) -> tuple[tuple[int, float], ...]:
    if not len(scores.proposal_blocks):
        return ()
    utility, order = torch.topk(
        scores.proposal_utility, min(_TOP_SCORES, len(scores.proposal_utility))
    )
    return tuple(zip(scores.proposal_blocks[order].tolist(), utility.tolist(), strict=True))


def _children(edit: Edit, block_size: int) -> list[Span]:
    """The entries on the fine side of an edit: of a chain, those that its steps leave."""
    children: list[Span] = []
    for level, start in edit.steps:
        if level == 1:
            children.append(Span(0, start, start + block_size))
            continue
        width = block_size ** (level - 1)
        children.extend(
            Span(level - 1, child, child + width)
            for child in range(start, start + block_size**level, width)
            if (level - 1, child) not in edit.steps
        )
    return sorted(children, key=lambda span: span.start)
