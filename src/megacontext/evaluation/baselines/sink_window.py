"""Attention sinks and the newest tokens (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

from megacontext.evaluation.baselines.raw_rival import RawRival
from megacontext.evaluation.baselines.rival import Span
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel


class SinkWindow(RawRival):
    """Keeps the first tokens of the history, on which attention rests, beside the newest ones.

    Positions count within the window, as in the paper. Unlike there, keys and values are computed
    anew for every window and not carried along, so that they owe nothing to evicted tokens.

    Args:
        base: the frozen base model.
        memory: where the tokens lie.
        budget: most tokens of context, prompt and answer together.
        sink_tokens: how many of the first tokens stay.
    """

    name = "sink_window"

    def __init__(self, base: BaseModel, memory: Memory, budget: int, sink_tokens: int = 4) -> None:
        super().__init__(base, memory, budget)
        self.sink_tokens = sink_tokens

    def spans(self, cursor: int, room: int, query: str) -> list[Span]:
        """The first tokens, then the newest."""
        sinks = min(self.sink_tokens, room, cursor)
        return [(0, sinks), (max(sinks, cursor - (room - sinks)), cursor)]
