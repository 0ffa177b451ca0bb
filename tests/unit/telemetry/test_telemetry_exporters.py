from __future__ import annotations

import sys

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

from megacontext.errors import ConfigError
from megacontext.telemetry import OpenTelemetrySink, PrometheusSink, Span, Telemetry


def emit(telemetry: Telemetry) -> None:
    telemetry.ingest(generation=0, start=0, tokens=64, ms=20.0)
    telemetry.ingest(generation=0, start=64, tokens=32, ms=30.0)
    telemetry.gist(generation=0, level=1, first=0, count=3, ms=3.0)
    telemetry.score(generation=0, policy="lens", entries=3, ms=2.0)
    telemetry.commit(generation=1, tokens=96, levels=2, bytes_written=500, ms=4.0)
    telemetry.edit(
        generation=1,
        action="collapse",
        removed=[Span(0, 0, 32)],
        added=[Span(1, 0, 32)],
        score=-0.05,
        cost_change=-31,
        reason="worst score",
    )
    telemetry.refocus(
        generation=1,
        round=0,
        policy="lens",
        cursor=96,
        entries=3,
        edits=1,
        cost=65,
        budget=128,
        recomputed=64,
        reason="period",
        ms=5.0,
    )
    telemetry.decode(generation=1, start=96, tokens=8, cost=65, ms=80.0)


def test_prometheus_counts_and_times_every_kind():
    registry = CollectorRegistry()
    emit(Telemetry(PrometheusSink(registry)))

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(f"megacontext_{name}", labels)

    assert value("events_total", kind="ingest") == 2
    assert value("events_total", kind="edit") == 1
    assert value("tokens_total", kind="ingest") == 96
    assert value("tokens_total", kind="decode") == 8
    assert value("gists_total", level="1") == 3
    assert value("edits_total", action="collapse") == 1
    assert value("committed_bytes_total") == 500
    assert value("working_context_cost") == 65
    assert value("working_context_budget") == 128
    assert value("memory_generation") == 1
    assert value("step_seconds_sum", kind="ingest") == pytest.approx(0.05)
    assert value("step_seconds_count", kind="refocus") == 1
    assert value("edit_score_nats_bucket", le="-0.1") == 0
    assert value("edit_score_nats_bucket", le="-0.01") == 1
    assert b"megacontext_step_seconds_bucket" in generate_latest(registry)


def test_two_prometheus_sinks_cannot_share_a_registry():
    registry = CollectorRegistry()
    PrometheusSink(registry)
    with pytest.raises(ConfigError, match="registry"):
        PrometheusSink(registry)


@pytest.fixture
def tracing():
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


def test_events_join_the_span_that_is_being_recorded(tracing):
    provider, exporter = tracing
    telemetry = Telemetry(OpenTelemetrySink(provider), clock=lambda: 12.5)
    with provider.get_tracer("test").start_as_current_span("request"):
        emit(telemetry)
    (span,) = exporter.get_finished_spans()
    assert [event.name for event in span.events] == [
        f"megacontext.{kind}"
        for kind in (
            "ingest", "ingest", "gist", "score", "commit", "edit", "refocus", "decode",
        )
    ]  # fmt: skip
    edit = span.events[5]
    assert edit.timestamp == 12_500_000_000
    assert edit.attributes["removed"] == ("0:0:32",)
    assert edit.attributes["added"] == ("1:0:32",)
    assert edit.attributes["score"] == -0.05
    assert edit.attributes["sequence"] == 5
    assert "text" not in span.events[7].attributes


def test_without_a_span_an_event_gets_its_own(tracing):
    provider, exporter = tracing
    telemetry = Telemetry(OpenTelemetrySink(provider))
    telemetry.gist(generation=0, level=2, first=0, count=1, ms=1.0)
    (span,) = exporter.get_finished_spans()
    assert span.name == "megacontext.gist"
    assert span.events[0].attributes["level"] == 2


@pytest.mark.parametrize(
    ("sink", "module", "package"),
    [
        (PrometheusSink, "prometheus_client", "prometheus-client"),
        (OpenTelemetrySink, "opentelemetry", "opentelemetry-api"),
    ],
)
def test_a_missing_library_is_named_with_the_extra_that_brings_it(
    monkeypatch, sink, module, package
):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{package} is not installed.*megacontext\[telemetry\]"):
        sink()
