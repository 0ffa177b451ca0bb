from __future__ import annotations

import itertools
import logging
import threading

import pytest

from megacontext.errors import InvariantError
from megacontext.telemetry import MemorySink, NullSink, Span, Telemetry


def emit_one_of_each(telemetry: Telemetry) -> None:
    telemetry.ingest(generation=0, start=0, tokens=64, ms=2.0, source_id=1, text="secret")
    telemetry.gist(generation=0, level=1, first=0, count=2, ms=3.0)
    telemetry.commit(generation=1, tokens=64, levels=2, bytes_written=512, ms=4.0)
    telemetry.score(
        generation=1,
        policy="lens",
        entries=2,
        ms=1.0,
        spans=[Span(1, 0, 32)],
        scores=[0.5],
    )
    telemetry.edit(
        generation=1,
        action="expand",
        removed=[Span(1, 0, 32)],
        added=[Span(0, 0, 32)],
        score=0.5,
        cost_change=31,
        reason="best positive score",
    )
    telemetry.refocus(
        generation=1,
        round=0,
        policy="lens",
        cursor=64,
        entries=2,
        edits=1,
        cost=64,
        budget=128,
        recomputed=32,
        reason="before an answer",
        ms=5.0,
    )
    telemetry.decode(generation=1, start=64, tokens=8, cost=64, ms=80.0, text="secret")


def test_events_are_numbered_without_gaps_and_timed():
    sink = MemorySink()
    clock = itertools.count(100, 2)
    emit_one_of_each(Telemetry(sink, clock=lambda: float(next(clock))))
    assert [event.kind for event in sink.events] == [
        "ingest", "gist", "commit", "score", "edit", "refocus", "decode",
    ]  # fmt: skip
    assert [event.sequence for event in sink.events] == list(range(7))
    assert [event.time for event in sink.events] == [100.0 + 2 * i for i in range(7)]
    assert [event.generation for event in sink.events] == [0, 0, 1, 1, 1, 1, 1]


def test_text_stays_out_unless_asked_for():
    silent, open_ = MemorySink(), MemorySink()
    emit_one_of_each(Telemetry(silent))
    emit_one_of_each(Telemetry(open_, include_text=True))
    assert not any("secret" in event.model_dump_json() for event in silent.events)
    assert [event.kind for event in open_.events if "secret" in event.model_dump_json()] == [
        "ingest",
        "decode",
    ]


def test_a_refused_event_names_the_field_and_takes_no_number():
    sink = MemorySink()
    telemetry = Telemetry(sink)
    with pytest.raises(InvariantError, match="GistEvent refused: level"):
        telemetry.gist(generation=0, level=0, first=0, count=1, ms=1.0)
    telemetry.gist(generation=0, level=1, first=0, count=1, ms=1.0)
    assert [event.sequence for event in sink.events] == [0]


def test_threads_share_one_numbering_in_the_order_of_writing():
    sink = MemorySink()
    telemetry = Telemetry(sink)

    def work() -> None:
        for index in range(200):
            telemetry.gist(generation=0, level=1, first=index, count=1, ms=0.0)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.sequence for event in sink.events] == list(range(800))


def test_without_a_sink_nothing_is_made():
    def clock() -> float:
        raise AssertionError("an event was timed")

    for telemetry in (Telemetry(clock=clock), Telemetry(NullSink(), clock=clock)):
        assert not telemetry.enabled
        emit_one_of_each(telemetry)
    assert Telemetry(MemorySink()).enabled


def test_leaving_the_context_closes_the_sink():
    closed = []

    class Closing(NullSink):
        def close(self) -> None:
            closed.append(self)

    with Telemetry(Closing()):
        assert not closed
    assert len(closed) == 1


def test_the_package_logger_is_silent_until_configured():
    handlers = logging.getLogger("megacontext").handlers
    assert any(isinstance(handler, logging.NullHandler) for handler in handlers)
