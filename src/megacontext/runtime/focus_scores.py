"""What a focus policy hands to the allocator, and what the allocator hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from megacontext.errors import InputError
from megacontext.runtime.working_context import WorkingContext

EditKind = Literal["expand", "collapse"]
EditReason = Literal["proposal", "utility", "room", "payment", "threshold"]


@dataclass(frozen=True, eq=False)
class FocusScores:
    """Utilities in nats over the next tokens, for one working context of ``n`` entries.

    Attributes:
        proposal_blocks: ``[m]`` int64, L0 blocks anywhere in the history; order and repetition do
            not matter (the highest utility of a block counts).
        proposal_utility: ``[m]`` float32, what having that block raw is worth, whole chain.
        entry_utility: ``[n]`` float32, what keeping the entry at its detail is worth against
            collapsing it with its siblings; their sum is the loss. Negative: detail does harm.
        expand_utility: ``[n]`` float32, what replacing a gist by its children is worth;
            0 where unknown, ignored for raw entries.
        unread: whether there is more to read than one look reads, so that a further look for the
            same would know more.
    """

    proposal_blocks: Tensor
    proposal_utility: Tensor
    entry_utility: Tensor
    expand_utility: Tensor
    unread: bool = False

    @classmethod
    def unknown(cls, n_entries: int) -> Self:
        """No proposals, and zero for every entry: nothing asks for an edit."""
        nothing, zeros = torch.empty(0), torch.zeros(n_entries)
        return cls(nothing.long(), nothing, zeros, zeros)

    def check(self, context: WorkingContext) -> Self:
        """Returns these scores if they fit the context.

        Raises:
            InputError: a shape differs, a value is not finite, or a block is not in the history.
        """
        n, m = len(context), self.proposal_blocks.numel()
        for name, size in (
            ("proposal_blocks", m),
            ("proposal_utility", m),
            ("entry_utility", n),
            ("expand_utility", n),
        ):
            values: Tensor = getattr(self, name)
            if tuple(values.shape) != (size,):
                raise InputError(
                    f"focus scores: {name} has shape {tuple(values.shape)}, expected ({size},)"
                )
            if values.is_floating_point() == (name == "proposal_blocks"):
                raise InputError(f"focus scores: {name} has dtype {values.dtype}")
            if not bool(values.isfinite().all()):
                index = int((~values.isfinite()).nonzero()[0])
                raise InputError(f"focus scores: {name}[{index}] is {float(values[index])}")
        n_blocks = -(-context.cursor // context.block_size)
        outside = (self.proposal_blocks < 0) | (self.proposal_blocks >= n_blocks)
        if bool(outside.any()):
            block = int(self.proposal_blocks[outside][0])
            raise InputError(f"focus scores: block {block} is proposed, history has {n_blocks}")
        return self


@dataclass(frozen=True)
class Edit:
    """One change of the working context.

    Attributes:
        kind: ``expand`` or ``collapse``.
        level: level of the gist that was opened (of a chain: the first), or closed into.
        start: first token of that gist.
        end: token after its last one.
        score: nats: what the expand is worth, or what the collapse loses.
        cost_change: token-equivalents, positive for an expand.
        reason: ``proposal`` or ``utility`` (an expand, by who asked for it); ``room`` (a collapse
            the budget demanded), ``payment`` (one that pays for an expand of the same plan) or
            ``threshold`` (one whose loss lies below the collapse threshold).
        steps: the gists opened or closed, as ``(level, start)``, in order; several for a chain.
    """

    kind: EditKind
    level: int
    start: int
    end: int
    score: float
    cost_change: int
    reason: EditReason
    steps: tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False)
class AllocatorState:
    """Which spans were edited lately; immutable, made anew by every plan.

    Attributes:
        round: refocus rounds planned so far.
        levels: ``[r]`` int64, level of each gist opened or closed lately.
        starts: ``[r]`` int64, its first token.
        rounds: ``[r]`` int64, the round of that edit.
    """

    round: int
    levels: Tensor
    starts: Tensor
    rounds: Tensor

    @classmethod
    def initial(cls) -> Self:
        """Before the first round: no span was edited."""
        nothing = torch.empty(0, dtype=torch.int64)
        return cls(0, nothing, nothing, nothing)


@dataclass(frozen=True, eq=False)
class FocusPlan:
    """The outcome of one refocus.

    Attributes:
        edits: in the order in which they were applied.
        context: the new working context; every invariant holds.
        state: what the next plan needs to know.
        unread: see :class:`FocusScores`.
    """

    edits: tuple[Edit, ...]
    context: WorkingContext
    state: AllocatorState
    unread: bool = False

    @property
    def more(self) -> bool:
        """Whether a further look for the same may open more: this one did, or left some unread."""
        return self.unread or any(edit.kind == "expand" for edit in self.edits)
