"""Telemetry: one event schema for every step, and the sinks that take the events.

Events carry counts, spans, scores and times, but no text unless the owner of the
:class:`Telemetry` asks for it with ``include_text``.
"""

import logging

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
    event_json_schema,
)
from megacontext.telemetry.exporters import OpenTelemetrySink, PrometheusSink
from megacontext.telemetry.recorder import Telemetry
from megacontext.telemetry.sinks import (
    FanOut,
    JsonlSink,
    MemorySink,
    NullSink,
    Sink,
    read_events,
)

logging.getLogger("megacontext").addHandler(logging.NullHandler())

__all__ = [
    "CommitEvent",
    "DecodeEvent",
    "EditEvent",
    "Event",
    "FanOut",
    "GistEvent",
    "IngestEvent",
    "JsonlSink",
    "MemorySink",
    "NullSink",
    "OpenTelemetrySink",
    "PrometheusSink",
    "RefocusEvent",
    "ScoreEvent",
    "Sink",
    "Span",
    "Telemetry",
    "event_json_schema",
    "read_events",
]
