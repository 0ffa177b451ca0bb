"""The object that the engine tells what it did."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

from pydantic import ValidationError

from megacontext.closing import Closing
from megacontext.errors import InvariantError
from megacontext.telemetry.events import (
    CommitEvent,
    DecodeEvent,
    EditEvent,
    Event,
    GistEvent,
    IngestEvent,
    RefocusEvent,
    ScoreEvent,
    Span,
)
from megacontext.telemetry.sinks import NullSink, Sink


class Telemetry(Closing):
    """Numbers, times and hands on events; safe to call from several threads.

    Every method takes ``generation``, the commit counter of the memory at that moment, and ``ms``,
    the wall time of the step in milliseconds; the other arguments are the fields of its event.
    Each raises :class:`InvariantError` for a value that the event does not allow.

    Args:
        sink: where the events go; nowhere if ``None``.
        include_text: whether events carry text; without it any text given is left out.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        sink: Sink | None = None,
        *,
        include_text: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.include_text = include_text
        self._sink = NullSink() if sink is None else sink
        self._clock = clock
        self._next = 0
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        """Whether anybody gets the events; if not, callers may save the work of gathering them."""
        return not isinstance(self._sink, NullSink)

    def ingest(
        self,
        *,
        generation: int,
        start: int,
        tokens: int,
        ms: float,
        source_id: int | None = None,
        text: str | None = None,
    ) -> None:
        """Emits an :class:`IngestEvent`."""
        self._emit(
            IngestEvent,
            generation=generation,
            start=start,
            tokens=tokens,
            ms=ms,
            source_id=source_id,
            text=self._allowed(text),
        )

    def gist(self, *, generation: int, level: int, first: int, count: int, ms: float) -> None:
        """Emits a :class:`GistEvent`."""
        self._emit(GistEvent, generation=generation, level=level, first=first, count=count, ms=ms)

    def score(
        self,
        *,
        generation: int,
        policy: str,
        entries: int,
        ms: float,
        spans: Sequence[Span] = (),
        scores: Sequence[float] = (),
    ) -> None:
        """Emits a :class:`ScoreEvent`; ``scores`` in nats, one per span."""
        self._emit(
            ScoreEvent,
            generation=generation,
            policy=policy,
            entries=entries,
            ms=ms,
            spans=tuple(spans),
            scores=tuple(scores),
        )

    def edit(
        self,
        *,
        generation: int,
        action: Literal["expand", "collapse"],
        removed: Sequence[Span],
        added: Sequence[Span],
        score: float,
        cost_change: int,
        reason: str,
    ) -> None:
        """Emits an :class:`EditEvent`; ``score`` in nats, ``cost_change`` in token-equivalents."""
        self._emit(
            EditEvent,
            generation=generation,
            action=action,
            removed=tuple(removed),
            added=tuple(added),
            score=score,
            cost_change=cost_change,
            reason=reason,
        )

    def refocus(
        self,
        *,
        generation: int,
        round: int,
        policy: str,
        cursor: int,
        entries: int,
        edits: int,
        cost: int,
        budget: int,
        recomputed: int,
        reason: str,
        ms: float,
        kv: str | None = None,
    ) -> None:
        """Emits a :class:`RefocusEvent`."""
        self._emit(
            RefocusEvent,
            generation=generation,
            round=round,
            policy=policy,
            cursor=cursor,
            entries=entries,
            edits=edits,
            cost=cost,
            budget=budget,
            recomputed=recomputed,
            reason=reason,
            ms=ms,
            kv=kv,
        )

    def decode(
        self,
        *,
        generation: int,
        start: int,
        tokens: int,
        cost: int,
        ms: float,
        text: str | None = None,
    ) -> None:
        """Emits a :class:`DecodeEvent`, for a run of tokens rather than for each."""
        self._emit(
            DecodeEvent,
            generation=generation,
            start=start,
            tokens=tokens,
            cost=cost,
            ms=ms,
            text=self._allowed(text),
        )

    def commit(
        self, *, generation: int, tokens: int, levels: int, bytes_written: int, ms: float
    ) -> None:
        """Emits a :class:`CommitEvent`; ``generation`` is the one that the commit made."""
        self._emit(
            CommitEvent,
            generation=generation,
            tokens=tokens,
            levels=levels,
            bytes_written=bytes_written,
            ms=ms,
        )

    def close(self) -> None:
        """Closes the sink."""
        self._sink.close()

    def _allowed(self, text: str | None) -> str | None:
        return text if self.include_text else None

    def _emit(self, event_type: Callable[..., Event], **fields: Any) -> None:
        if not self.enabled:
            return
        # The lock spans the write, so that a file holds the events in the order of their numbers.
        with self._lock:
            try:
                event = event_type(sequence=self._next, time=self._clock(), **fields)
            except ValidationError as error:
                problems = "; ".join(
                    f"{'.'.join(map(str, item['loc']))}: {item['msg']}"
                    for item in error.errors(include_url=False, include_input=False)
                )
                raise InvariantError(
                    f"telemetry: {event_type.__name__} refused: {problems}"
                ) from None
            self._next += 1
            self._sink.write(event)
