"""The whole history raw, where the base model can read it."""

from __future__ import annotations

from megacontext.errors import InputError
from megacontext.evaluation.baselines.raw_rival import RawRival
from megacontext.evaluation.baselines.rival import Span
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel


class FullContext(RawRival):
    """Reads everything. Its budget is all positions of the base, which may be more than ``W``."""

    name = "full"

    def __init__(self, base: BaseModel, memory: Memory) -> None:
        super().__init__(base, memory, base.max_positions)

    def spans(self, cursor: int, room: int, query: str) -> list[Span]:
        """All of the history.

        Raises:
            InputError: it is longer than ``room``, so full context is not applicable.
        """
        if cursor > room:
            raise InputError(
                f"full context is not applicable: {cursor} tokens of history, and {room} of the "
                f"{self.budget} positions of {self.base.name} are left for them"
            )
        return [(0, cursor)]
