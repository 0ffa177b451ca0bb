"""How restless the focus is, measured over a run: swap rate, residency, utilization."""

from __future__ import annotations

import torch

from megacontext.runtime.focus_scores import FocusPlan
from megacontext.runtime.working_context import WorkingContext


class FocusMeter:
    """Watches a sequence of plans; one :meth:`observe` per refocus."""

    def __init__(self) -> None:
        self._rounds = 0
        self._rates = 0.0
        self._fill = 0.0
        self._entry_rounds = 0
        self._stays = 0
        self._present = torch.empty(0, dtype=torch.int64)

    def observe(self, before: WorkingContext, plan: FocusPlan) -> None:
        """Takes in one refocus.

        Args:
            before: the window that the plan was made for.
            plan: its outcome.
        """
        keys = plan.context.keys
        self._rounds += 1
        self._rates += len(plan.edits) / max(1, len(before))
        self._fill += plan.context.cost / plan.context.budget
        self._entry_rounds += keys.numel()
        self._stays += keys.numel() - int(torch.isin(keys, self._present).sum())
        self._present = keys

    @property
    def swap_rate(self) -> float:
        """Edits per entry per refocus, mean over refocuses; healthy up to 0.25. 0 before any."""
        return self._rates / max(1, self._rounds)

    @property
    def residency(self) -> float:
        """Refocus rounds a span keeps its level, mean over all stays; healthy from 3 on.

        A stay is a run of consecutive rounds in which a span is an entry of one level. Stays that
        still last count as long as they are so far, so the value is a lower bound. 0 before any.
        """
        return self._entry_rounds / max(1, self._stays)

    @property
    def utilization(self) -> float:
        """Cost over budget after the plan, mean over the refocuses. 0 before any."""
        return self._fill / max(1, self._rounds)
