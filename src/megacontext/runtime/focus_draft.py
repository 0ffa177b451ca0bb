"""A plan in the making: the window so far, what its entries are worth, and the edits made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from megacontext.runtime.focus_scores import Edit, EditReason, FocusScores
from megacontext.runtime.working_context import WorkingContext, node_keys


@dataclass(frozen=True, eq=False)
class FocusDraft:
    """Immutable: every step returns a new draft, so a step that cannot be paid is just dropped.

    Attributes:
        context: the window after the edits so far.
        keep: ``[n]`` float64 nats, what keeping each entry at its detail is worth.
        scored: ``[n]`` bool, false for entries that this plan made.
        cooling: ``[r]`` int64 node keys of the spans that are not to be edited back yet.
        edits: so far, in order.
        counted: how many of them count against the cap: all but those that make room.
        moved: token-equivalents by which expands and threshold collapses changed the window.
    """

    context: WorkingContext
    keep: Tensor
    scored: Tensor
    cooling: Tensor
    edits: tuple[Edit, ...] = ()
    counted: int = 0
    moved: int = 0

    @classmethod
    def start(cls, context: WorkingContext, scores: FocusScores, cooling: Tensor) -> Self:
        """A draft without edits.

        Whatever is asked for inside an entry counts for the entry: to collapse it would undo the
        request, or make it dearer.
        """
        keep = scores.entry_utility.double()
        wanted = context.legal_expand & (scores.expand_utility > 0)
        keep = torch.where(wanted, torch.maximum(keep, scores.expand_utility.double()), keep)
        worthy = scores.proposal_utility > 0
        holders = context.indices_of(scores.proposal_blocks[worthy] * context.block_size)
        keep = keep.scatter_reduce(0, holders, scores.proposal_utility[worthy].double(), "amax")
        return cls(context, keep, torch.ones_like(keep, dtype=torch.bool), cooling)

    @cached_property
    def blocked(self) -> Tensor:
        """Node keys that are cooling or were edited by this plan, ``[r]`` int64."""
        steps = [step for edit in self.edits for step in edit.steps]
        if not steps:
            return self.cooling
        levels, starts = torch.tensor(steps).unbind(1)
        return torch.cat((self.cooling, node_keys(levels, starts)))

    @cached_property
    def losses(self) -> Tensor:
        """``[g]`` float64 nats that collapsing each sibling group would lose."""
        return self.context.sibling_groups.sums(self.keep)

    @cached_property
    def worst_first(self) -> Tensor:
        """Sibling groups by nats lost per token-equivalent freed, ``[g]`` int64.

        Among equals those that are cooling come last, and older ones before newer ones.
        """
        groups = self.context.sibling_groups
        order = torch.argsort(torch.isin(groups.keys, self.cooling).long(), stable=True)
        return order[torch.argsort((self.losses / groups.freed)[order], stable=True)]

    @cached_property
    def movable(self) -> Tensor:
        """:attr:`worst_first` without the blocked groups, ``[h]`` int64."""
        blocked = torch.isin(self.context.sibling_groups.keys, self.blocked)
        return self.worst_first[~blocked[self.worst_first]]

    def make_room(self, limit: int, spare: int = 0) -> FocusDraft:
        """Collapses until the window costs at most ``limit``, which the coarsest tiling must meet.

        Each pass takes as many of the present groups, worst first, as the need demands; gists that
        a pass made may collapse in the next. Once there is need, groups that lose nothing go on
        collapsing until ``spare`` token-equivalents more are free, or none of them is left.
        """
        draft, goal = self, limit
        while draft.context.cost > goal:
            order, excess = draft.worst_first, draft.context.cost - limit
            idle = int((draft.losses <= 0).sum())
            wanted = min(_enough(draft, order, excess + spare), idle)
            needed = _enough(draft, order, excess) if excess > 0 else 0
            count = max(needed, wanted)
            if not count:
                break
            draft, goal = draft.collapse(order[:count], "room"), limit - spare
        return draft

    def pay(self, needed: int, gain: float, token: int, max_edits: int) -> FocusDraft | None:
        """Frees ``needed`` token-equivalents for an expand at ``token``, or gives up with ``None``.

        Args:
            needed: nothing is collapsed where this is not positive.
            gain: nats; all payments together must lose less.
            token: groups whose parent covers it stay, since the expand happens inside.
            max_edits: cap for :attr:`counted`. Where the worst groups are too many, the largest
                are taken first.
        """
        draft, lost = self, 0.0
        while needed > 0:
            groups = draft.context.sibling_groups
            order = draft.movable
            order = order[(groups.starts[order] > token) | (groups.ends[order] <= token)]
            count = _enough(draft, order, needed)
            if draft.counted + count > max_edits:
                order = order[torch.argsort(groups.freed[order], descending=True, stable=True)]
                count = _enough(draft, order, needed)
            chosen = order[:count]
            lost += float(draft.losses[chosen].sum())
            if count == 0 or draft.counted + count > max_edits or lost >= gain:
                return None
            needed -= int(groups.freed[chosen].sum())
            draft = draft.collapse(chosen, "payment")
        return draft

    def unpayable(self, needed: Tensor, gains: Tensor, max_edits: int) -> Tensor:
        """``[c]`` bool: expands for which :meth:`pay` must give up, told without trying each.

        Bounds from below: the fewest groups are the largest ones, and no set of groups that frees
        so much loses less than the worst-first prefix with its last group taken in part.
        """
        groups, order = self.context.sibling_groups, self.movable
        if order.numel() == 0:
            return needed > 0
        freed = groups.freed[order]
        largest = freed.sort(descending=True).values.cumsum(0)
        too_many = self.counted + torch.searchsorted(largest, needed) + 1 > max_edits
        losses = self.losses[order]
        total = torch.cat((torch.zeros(1, dtype=torch.int64), freed.cumsum(0)))
        lost = torch.cat((torch.zeros(1, dtype=torch.float64), losses.cumsum(0)))
        last = torch.searchsorted(total[1:], needed)
        inside = last.clamp(max=order.numel() - 1)
        share = (needed - total[inside]) / freed[inside]
        least = torch.maximum(lost[inside] + share * losses[inside], lost.min())
        least = torch.where(losses[inside] < 0, lost.min(), least)
        slack = 1e-9 * (1 + losses.abs().sum())
        too_dear = (last < order.numel()) & (least - slack > gains)
        return (needed > 0) & (too_many | too_dear)

    def prices(self, starts: Tensor, levels: Tensor) -> Tensor:
        """Token-equivalents to open the window at ``starts`` down to ``levels``, ``[c]`` int64.

        0 where that is so already, or a gist on the way is blocked.
        """
        context = self.context
        ladder = torch.arange(1, context.top_level + 1)
        widths = torch.tensor([context.block_size ** int(i) for i in ladder.tolist()])
        nodes = starts[:, None] - starts[:, None] % widths
        here = context.levels[context.indices_of(starts)]
        crossed = (levels[:, None] < ladder) & (ladder <= here[:, None])
        stuck = (crossed & torch.isin(node_keys(ladder, nodes), self.blocked)).any(dim=1)
        return context.open_costs(starts, levels).masked_fill(stuck, 0)

    def open(self, token: int, level: int, score: float, reason: EditReason) -> FocusDraft:
        """Expands the chain over ``token`` down to ``level``, as one edit."""
        old = self.context
        index = old.index_of(token)
        new = old.open_to(token, level)
        made = len(new) - len(old) + 1
        here, start, end = old.spans()[index].tolist()
        widths = [(i, old.block_size**i) for i in range(here, level, -1)]
        edit = Edit(
            kind="expand",
            level=here,
            start=start,
            end=end,
            score=score,
            cost_change=new.cost - old.cost,
            reason=reason,
            steps=tuple((i, token // width * width) for i, width in widths),
        )
        fill = torch.zeros(made, dtype=self.keep.dtype)
        return replace(
            self,
            context=new,
            keep=torch.cat((self.keep[:index], fill, self.keep[index + 1 :])),
            scored=torch.cat((self.scored[:index], fill > 0, self.scored[index + 1 :])),
            edits=(*self.edits, edit),
            counted=self.counted + 1,
            moved=self.moved + edit.cost_change,
        )

    def collapse(self, chosen: Tensor, reason: EditReason) -> FocusDraft:
        """Collapses the sibling groups ``chosen`` ``[c]``, one edit each."""
        groups, losses = self.context.sibling_groups, self.losses[chosen]
        first = groups.first[chosen]
        left = groups.survivors(chosen, len(self.context))
        columns = (groups.levels, groups.starts, groups.ends, groups.freed)
        rows = torch.stack([column[chosen] for column in columns], dim=1).tolist()
        edits = tuple(
            Edit("collapse", level, start, end, loss, -freed, reason, ((level, start),))
            for (level, start, end, freed), loss in zip(rows, losses.tolist(), strict=True)
        )
        unscored = torch.zeros_like(first, dtype=torch.bool)
        moved = int(groups.freed[chosen].sum()) if reason == "threshold" else 0
        return replace(
            self,
            context=self.context.collapse_groups(chosen),
            keep=self.keep.index_copy(0, first, losses.clamp(min=0))[left],
            scored=self.scored.index_copy(0, first, unscored)[left],
            edits=self.edits + edits,
            counted=self.counted + (0 if reason == "room" else len(edits)),
            moved=self.moved + moved,
        )


def _enough(draft: FocusDraft, order: Tensor, needed: int) -> int:
    """How many groups of ``order`` free ``needed`` token-equivalents; all of them if too few."""
    freed = draft.context.sibling_groups.freed[order].cumsum(0)
    return min(int((freed < needed).sum()) + 1, order.numel())
