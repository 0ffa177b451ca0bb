"""The plainest rival: the same budget spent on the newest raw tokens."""

from __future__ import annotations

from megacontext.evaluation.baselines.raw_rival import RawRival
from megacontext.evaluation.baselines.rival import Span


class SlidingWindow(RawRival):
    """A base model that sees only the newest tokens of a history; gists are not used."""

    name = "window"

    def spans(self, cursor: int, room: int, query: str) -> list[Span]:
        """The newest ``room`` tokens."""
        return [(max(0, cursor - room), cursor)]
