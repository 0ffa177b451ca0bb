"""The focus allocator: moves detail in the working context to where it is worth its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megacontext.config import FrozenConfig
from megacontext.errors import ConfigError, InputError
from megacontext.runtime.focus_draft import FocusDraft
from megacontext.runtime.focus_scores import AllocatorState, Edit, FocusPlan, FocusScores
from megacontext.runtime.working_context import WorkingContext, node_keys


class AllocatorConfig(FrozenConfig):
    """How eagerly a refocus edits the working context.

    Attributes:
        max_edits: edits per plan, payments included, room-making excluded. A chain of expands
            down to one block is one edit.
        expand_threshold: nats; expands worth less are not considered.
        collapse_threshold: nats; a group whose loss is below it collapses without need. The gap to
            ``expand_threshold`` is the hysteresis that keeps a span from flickering.
        swap_margin: nats by which an expand must exceed what its payments lose.
        cooldown: rounds for which a span that was expanded or collapsed is not edited back.
            Room-making neither starts a cooldown nor is bound by one.
        competition: how expands are ordered. ``greedy``: by utility per token-equivalent.
            ``softmax``: by mass per token-equivalent, where the masses are the softmax of all
            candidates' utilities (normalised over the candidates as in Slot Attention,
            arXiv:2006.15055), so that strong requests crowd out weak ones.
        temperature: nats; of that softmax. Small: the best wins whatever it costs; large: the
            cheapest wins.
        move_budget: token-equivalents by which the expands of one plan, plus its collapses below
            the threshold, may change the window. An expand that alone needs more never happens.
        headroom: token-equivalents kept free for the tokens decoded until the next refocus.
        spare_share: share of the budget that making room frees beyond the need, as far as nothing
            of known worth collapses for it. A collapse far back has what stands behind it computed
            again, or moved, so room for several blocks at once costs less than block by block.
    """

    max_edits: int = Field(default=8, ge=0, le=65_536)
    expand_threshold: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    collapse_threshold: float = Field(default=0.0, allow_inf_nan=False)
    swap_margin: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    cooldown: int = Field(default=2, ge=0, le=65_536)
    competition: Literal["softmax", "greedy"] = "softmax"
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    move_budget: int = Field(default=1024, ge=1)
    headroom: int = Field(default=32, ge=0)
    spare_share: float = Field(default=0.1, ge=0, le=0.5)

    @model_validator(mode="after")
    def _thresholds_leave_a_gap(self) -> Self:
        if self.collapse_threshold >= self.expand_threshold:
            raise ValueError(
                f"collapse_threshold {self.collapse_threshold} must be below expand_threshold "
                f"{self.expand_threshold}"
            )
        return self


@dataclass(frozen=True, eq=False)
class _Candidates:
    """Expands worth considering, one per target, oldest first: bring ``start`` to ``level``."""

    starts: Tensor  # [c] int64 token
    levels: Tensor  # [c] int64, level the entry over `start` shall have
    utility: Tensor  # [c] float64 nats
    proposed: Tensor  # [c] bool

    def order(self, costs: Tensor, config: AllocatorConfig) -> list[int]:
        """Indices, the one to serve first in front; ties to the newer span, then to more detail."""
        if config.competition == "softmax":
            # The logarithm of mass per cost: the mass itself would underflow to ties.
            mass = torch.log_softmax(self.utility / config.temperature, dim=0)
            priority = mass - costs.double().log()
        else:
            priority = self.utility / costs
        order = torch.argsort(self.levels, stable=True)
        order = order[torch.argsort(self.starts[order], descending=True, stable=True)]
        order = order[torch.argsort(priority[order], descending=True, stable=True)]
        return order.tolist()

    def take(self, chosen: Tensor) -> _Candidates:
        """The candidates at ``chosen``, a mask or indices."""
        return _Candidates(
            self.starts[chosen], self.levels[chosen], self.utility[chosen], self.proposed[chosen]
        )


class FocusAllocator:
    """Greedy and deterministic: a plan is a pure function of context, scores and state.

    A plan has three steps. It makes room, if the window leaves less than ``reserve + headroom`` of
    the budget free: the groups that lose the fewest nats per token-equivalent freed collapse,
    oldest first among equals, and those that lose nothing go on until there is room to spare. It
    expands, best first (:attr:`AllocatorConfig.competition`), where needed against payment: other
    groups collapse that lose less than is won. It collapses groups whose loss lies below the
    threshold. What one step did, a later one does not undo.

    A gist made in this plan has no score of its own; until the next refocus it counts what its
    children lost together, or 0 if that was negative.
    """

    def __init__(self, config: AllocatorConfig | None = None) -> None:
        self.config = AllocatorConfig() if config is None else config

    def plan(
        self,
        context: WorkingContext,
        scores: FocusScores,
        state: AllocatorState,
        reserve: int = 0,
    ) -> FocusPlan:
        """Plans one refocus.

        Args:
            context: what the model reads now; may be over budget after ``extend``.
            scores: utilities for its entries, and proposals.
            state: of the previous plan, or :meth:`AllocatorState.initial`.
            reserve: token-equivalents to keep free for a prompt appended after the cursor.

        Raises:
            ConfigError: even the coarsest tiling does not fit into what the budget leaves.
            InputError: the scores do not fit the context, or ``reserve`` is negative.
            InvariantError: the context violates one.
        """
        limit = self._limit(context, reserve)
        draft = self._start(context, scores, state).make_room(limit, self._spare(context))
        draft = self._expand(draft, self._candidates(context, scores), limit)
        draft = self._collapse(draft)
        state = self._next_state(state, draft.edits)
        return FocusPlan(draft.edits, draft.context.check(), state, scores.unread)

    def make_room(
        self,
        context: WorkingContext,
        scores: FocusScores,
        state: AllocatorState,
        reserve: int = 0,
    ) -> FocusPlan:
        """Only the first step of :meth:`plan`, between refocuses; the state stays as it is.

        Args:
            context: what the model would read; usually over budget after ``extend``.
            scores: as for :meth:`plan`; :meth:`FocusScores.unknown` collapses the oldest groups
                first, those edited lately last.
            state: of the previous plan.
            reserve: token-equivalents to keep free for a prompt appended after the cursor.

        Raises:
            ConfigError: even the coarsest tiling does not fit into what the budget leaves.
            InputError: the scores do not fit the context, or ``reserve`` is negative.
            InvariantError: the context violates one.
        """
        limit = self._limit(context, reserve)
        draft = self._start(context, scores, state).make_room(limit, self._spare(context))
        return FocusPlan(draft.edits, draft.context.check(), state)

    def _limit(self, context: WorkingContext, reserve: int) -> int:
        if reserve < 0:
            raise InputError(f"reserve is {reserve}; it must be at least 0")
        limit = context.budget - reserve - self.config.headroom
        if context.coarsest_cost > limit:
            raise ConfigError(
                f"budget {context.budget} less reserve {reserve} and headroom "
                f"{self.config.headroom} leaves {limit} token-equivalents, but the coarsest window "
                f"over {context.cursor} tokens with a raw tail of {context.tail_tokens} costs "
                f"{context.coarsest_cost}; raise budget or lower tail_tokens"
            )
        return limit

    def _spare(self, context: WorkingContext) -> int:
        return int(self.config.spare_share * context.budget)

    def _start(
        self, context: WorkingContext, scores: FocusScores, state: AllocatorState
    ) -> FocusDraft:
        recent = state.round + 1 - state.rounds <= self.config.cooldown
        cooling = node_keys(state.levels[recent], state.starts[recent])
        return FocusDraft.start(context.check(budget=False), scores.check(context), cooling)

    def _candidates(self, context: WorkingContext, scores: FocusScores) -> _Candidates:
        wanting = context.legal_expand & (scores.expand_utility >= self.config.expand_threshold)
        worthy = scores.proposal_utility >= self.config.expand_threshold
        blocks = scores.proposal_blocks[worthy]
        # Opening a level-1 gist is the same edit as revealing its block: one candidate, not two.
        starts = torch.cat((blocks * context.block_size, context.starts[wanting]))
        levels = torch.cat((torch.zeros_like(blocks), context.levels[wanting] - 1))
        values = torch.cat((scores.proposal_utility[worthy], scores.expand_utility[wanting]))
        keys, member = torch.unique(node_keys(levels, starts), return_inverse=True)
        first = torch.full_like(keys, starts.numel())
        first.scatter_reduce_(0, member, torch.arange(starts.numel()), "amin")
        utility = torch.full(keys.shape, -torch.inf, dtype=torch.float64)
        utility.scatter_reduce_(0, member, values.double(), "amax")
        proposed = first < blocks.numel()
        return _Candidates(starts[first], levels[first], utility, proposed)

    def _expand(self, draft: FocusDraft, candidates: _Candidates, limit: int) -> FocusDraft:
        if not candidates.starts.numel():
            return draft
        prices = draft.prices(candidates.starts, candidates.levels)
        candidates = candidates.take(prices > 0)
        order = candidates.order(prices[prices > 0], self.config)
        starts, levels = candidates.starts.tolist(), candidates.levels.tolist()
        utility, proposed = candidates.utility.tolist(), candidates.proposed.tolist()
        # An expand changes what the others cost (siblings share their chain), a refusal does not.
        price, open_ = self._affordable(draft, candidates, prices[prices > 0], limit)
        for index in order:
            if not open_[index]:
                continue
            paid = draft.pay(
                draft.context.cost + price[index] - limit,
                utility[index] - self.config.swap_margin,
                starts[index],
                self.config.max_edits - 1,
            )
            if paid is not None:
                reason = "proposal" if proposed[index] else "utility"
                draft = paid.open(starts[index], levels[index], utility[index], reason)
                if draft.counted >= self.config.max_edits:
                    break
                prices = draft.prices(candidates.starts, candidates.levels)
                price, open_ = self._affordable(draft, candidates, prices, limit)
        return draft

    def _affordable(
        self, draft: FocusDraft, candidates: _Candidates, prices: Tensor, limit: int
    ) -> tuple[list[int], list[bool]]:
        """Each candidate's price in the draft, and whether to try and pay it."""
        needed = draft.context.cost + prices - limit
        gains = candidates.utility - self.config.swap_margin
        out = draft.unpayable(needed, gains, self.config.max_edits - 1)
        out |= (prices == 0) | (draft.moved + prices > self.config.move_budget)
        out |= draft.counted >= self.config.max_edits
        return prices.tolist(), (~out).tolist()

    def _collapse(self, draft: FocusDraft) -> FocusDraft:
        if draft.counted >= self.config.max_edits:
            return draft
        groups = draft.context.sibling_groups
        unscored = groups.sums((~draft.scored).long())
        low = (draft.losses < self.config.collapse_threshold) & (unscored == 0)
        chosen = draft.movable[low[draft.movable]][: self.config.max_edits - draft.counted]
        moved = draft.moved + groups.freed[chosen].cumsum(0)
        return draft.collapse(chosen[moved <= self.config.move_budget], "threshold")

    def _next_state(self, state: AllocatorState, edits: tuple[Edit, ...]) -> AllocatorState:
        now = state.round + 1
        steps = [step for edit in edits if edit.reason != "room" for step in edit.steps]
        made = torch.tensor(steps, dtype=torch.int64).reshape(-1, 2)
        recent = now + 1 - state.rounds <= self.config.cooldown
        return AllocatorState(
            round=now,
            levels=torch.cat((state.levels[recent], made[:, 0])),
            starts=torch.cat((state.starts[recent], made[:, 1])),
            rounds=torch.cat((state.rounds[recent], torch.full_like(made[:, 0], now))),
        )
