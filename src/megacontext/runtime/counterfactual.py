"""What a change of the working context would be worth: tried out with the base model itself."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from megacontext.runtime.focus_allocator import AllocatorConfig, FocusAllocator
from megacontext.runtime.focus_policies import FocusView
from megacontext.runtime.focus_scores import AllocatorState, FocusScores
from megacontext.runtime.working_context import WorkingContext

# Far above any utility: what is tried out is the last to make room for itself.
_KEPT = 1e6


class Counterfactual:
    """Measures changes of one working context by the summed NLL of tokens that are known to come.

    Every context tried fits into the budget, as the engine would make it: the oldest detail makes
    room for what is opened.

    Args:
        view: the context and what belongs to it.
        future: ``[h]`` int64, the tokens to come after history and pending tokens.
        batch: contexts read in one forward.
    """

    def __init__(self, view: FocusView, future: Tensor, *, batch: int = 4) -> None:
        self.view = view
        self.future = future
        self.batch = batch
        # Room to spare would be counted as the price of a single block.
        self._allocator = FocusAllocator(AllocatorConfig(spare_share=0.0))

    @cached_property
    def now(self) -> Tensor:
        """NLL of the coming tokens behind the context as it is, in nats, scalar float32."""
        return self._losses([(self.view.context, None)])[0]

    def blocks(self, blocks: Tensor) -> Tensor:
        """What having blocks ``[m]`` raw is worth, ``[m]`` float32 nats.

        Of a block that is a gist now, or lies under one, what opening the whole chain wins; of one
        that is raw, what collapsing it would lose. A block that cannot collapse is worth nothing.
        """
        context = self.view.context
        size = context.block_size
        entries = context.indices_of(blocks * size)
        raw = context.levels[entries] == 0
        tried: list[tuple[WorkingContext, int | None]] = []
        changed: list[int] = []
        for number, (block, entry) in enumerate(
            zip(blocks.tolist(), entries.tolist(), strict=True)
        ):
            if not bool(raw[number]):
                tried.append((context.reveal(block), block * size))
            elif bool(context.legal_collapse[entry]):
                tried.append((context.collapse(entry), None))
            else:
                continue
            changed.append(number)
        worth = torch.zeros(len(blocks))
        if tried:
            change = self.now - self._losses(tried)
            worth[changed] = torch.where(raw[changed], -change, change)
        return worth

    def entries(self, indices: Tensor) -> Tensor:
        """What entries ``[k]`` ask for, ``[k]`` float32 nats, signed as lens scores are.

        Of a gist, what replacing it by its children wins. Of a raw block, minus what collapsing it
        would win: negative where detail does harm.
        """
        context = self.view.context
        raw = context.levels[indices] == 0
        tried: list[tuple[WorkingContext, int | None]] = [
            (context.collapse(entry), None)
            if bool(raw[number])
            else (context.expand(entry), int(context.starts[entry]))
            for number, entry in enumerate(indices.tolist())
        ]
        if not tried:
            return torch.zeros(0)
        change = self.now - self._losses(tried)
        return torch.where(raw, -change, change)

    def _losses(self, tried: Sequence[tuple[WorkingContext, int | None]]) -> Tensor:
        """``[n]`` summed NLL behind contexts, each with a token whose entry is kept (or none)."""
        view = self.view
        losses: list[Tensor] = []
        for start in range(0, len(tried), self.batch):
            part = [
                view.reader.read(self._fitting(context, kept), view.pending, ahead=len(self.future))
                for context, kept in tried[start : start + self.batch]
            ]
            targets = self.future.expand(len(part), -1)
            losses.append(view.base.nll_batch(part, targets).sum(dim=1).cpu())
        return torch.cat(losses)

    def _fitting(self, context: WorkingContext, kept: int | None) -> WorkingContext:
        worth = torch.zeros(len(context))
        if kept is not None:
            worth[context.index_of(kept)] = _KEPT
        nothing = torch.empty(0)
        scores = FocusScores(nothing.long(), nothing, worth, torch.zeros(len(context)))
        reserve = len(self.view.pending) + len(self.future)
        state = AllocatorState.initial()
        return self._allocator.make_room(context, scores, state, reserve).context
