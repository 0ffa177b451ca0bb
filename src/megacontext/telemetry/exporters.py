"""Sinks for monitoring systems; their libraries come with the ``telemetry`` extra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from megacontext.errors import ConfigError
from megacontext.telemetry.events import (
    CommitEvent,
    DecodeEvent,
    EditEvent,
    Event,
    GistEvent,
    IngestEvent,
    RefocusEvent,
    ScoreEvent,
)

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider
    from prometheus_client import CollectorRegistry, Counter, Gauge


class PrometheusSink:
    """Counts and times the events as Prometheus metrics named ``megacontext_*``.

    Serving them is up to the caller, for example with ``prometheus_client.start_http_server``.

    Args:
        registry: a ``prometheus_client.CollectorRegistry``; the library's default if ``None``.

    Raises:
        ConfigError: ``prometheus-client`` is not installed, or the registry has such a sink.
    """

    _SCORE_BUCKETS: ClassVar[tuple[float, ...]] = (-1.0, -0.1, -0.01, 0.0, 0.01, 0.1, 1.0, 10.0)

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        try:
            import prometheus_client as prometheus
        except ImportError:
            raise _missing_extra("PrometheusSink", "prometheus-client") from None
        target = prometheus.REGISTRY if registry is None else registry
        try:
            self._register(target)
        except ValueError:
            raise ConfigError(
                "PrometheusSink: the registry has MegaContext's metrics already; "
                "make one sink per registry"
            ) from None

    def _register(self, registry: CollectorRegistry) -> None:
        import prometheus_client as prometheus

        def counter(name: str, text: str, *labels: str) -> Counter:
            return prometheus.Counter(f"megacontext_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return prometheus.Gauge(f"megacontext_{name}", text, registry=registry)

        self._events = counter("events", "Events by kind", "kind")
        self._tokens = counter("tokens", "Tokens taken in or decoded", "kind")
        self._gists = counter("gists", "Gists made, by level", "level")
        self._edits = counter("edits", "Edits of the working context", "action")
        self._bytes = counter("committed_bytes", "Bytes committed to the memory")
        self._cost = gauge("working_context_cost", "Token-equivalents of the working context")
        self._budget = gauge("working_context_budget", "Most token-equivalents it may cost")
        self._generation = gauge("memory_generation", "Commit counter of the memory")
        self._seconds = prometheus.Histogram(
            "megacontext_step_seconds", "Time a step took", ["kind"], registry=registry
        )
        self._scores = prometheus.Histogram(
            "megacontext_edit_score_nats",
            "Nats an edit was expected to win",
            buckets=self._SCORE_BUCKETS,
            registry=registry,
        )

    def write(self, event: Event) -> None:
        """Counts one event."""
        self._events.labels(event.kind).inc()
        self._generation.set(event.generation)
        if not isinstance(event, EditEvent):
            self._seconds.labels(event.kind).observe(event.ms / 1000)
        match event:
            case IngestEvent() | DecodeEvent():
                self._tokens.labels(event.kind).inc(event.tokens)
            case GistEvent():
                self._gists.labels(str(event.level)).inc(event.count)
            case EditEvent():
                self._edits.labels(event.action).inc()
                self._scores.observe(event.score)
            case RefocusEvent():
                self._cost.set(event.cost)
                self._budget.set(event.budget)
            case CommitEvent():
                self._bytes.inc(event.bytes_written)
            case ScoreEvent():
                pass

    def close(self) -> None:
        """Does nothing: the metrics stay readable in their registry."""


class OpenTelemetrySink:
    """Adds every event to the current OpenTelemetry span as ``megacontext.KIND``.

    Where no span is being recorded, the event gets a short one of its own. Spans of tokens become
    strings ``LEVEL:START:END``, since span attributes cannot be nested.

    Args:
        provider: the tracer provider for such spans; the global one if ``None``.

    Raises:
        ConfigError: ``opentelemetry-api`` is not installed.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        try:
            from opentelemetry import trace
        except ImportError:
            raise _missing_extra("OpenTelemetrySink", "opentelemetry-api") from None
        self._current_span = trace.get_current_span
        self._tracer = trace.get_tracer("megacontext", tracer_provider=provider)

    def write(self, event: Event) -> None:
        """Adds one event."""
        name = f"megacontext.{event.kind}"
        attributes = _flat_attributes(event)
        nanoseconds = int(event.time * 1e9)
        span = self._current_span()
        if span.is_recording():
            span.add_event(name, attributes, timestamp=nanoseconds)
            return
        with self._tracer.start_as_current_span(name) as own:
            own.add_event(name, attributes, timestamp=nanoseconds)

    def close(self) -> None:
        """Does nothing: the spans belong to their provider."""


def _flat_attributes(event: Event) -> dict[str, Any]:
    attributes: dict[str, Any] = event.model_dump(exclude={"kind", "time"}, exclude_none=True)
    for key in ("spans", "removed", "added"):
        if key in attributes:
            attributes[key] = [":".join(map(str, span)) for span in attributes[key]]
    return attributes


def _missing_extra(what: str, package: str) -> ConfigError:
    return ConfigError(
        f"{what}: {package} is not installed; run `pip install 'megacontext[telemetry]'`"
    )
