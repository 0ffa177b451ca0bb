"""What a session tells about itself: where it stands, and why a token was written."""

from __future__ import annotations

from dataclasses import dataclass

from megacontext.runtime.answer import DecodedToken
from megacontext.runtime.focus_loop import FocusRecord
from megacontext.runtime.reading import KVMode


@dataclass(frozen=True)
class Explanation:
    """Why a span was in context when a token was written.

    Attributes:
        token: the token asked about.
        record: the refocus in force: entries, proposals and edits.
    """

    token: DecodedToken
    record: FocusRecord


@dataclass(frozen=True)
class EngineState:
    """Where a session stands; ``entries`` counts working entries by level, ``kv`` is the mode."""

    cursor: int
    budget: int
    cost: int
    entries: dict[int, int]
    rounds: int
    policy: str
    kv: KVMode
    swap_rate: float
    residency: float
    utilization: float
