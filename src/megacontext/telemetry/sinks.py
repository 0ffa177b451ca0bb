"""Where events go: the ``Sink`` protocol, and the sinks that need nothing but Python."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from megacontext.errors import ConfigError, InputError
from megacontext.telemetry.events import Event, parse_event


class Sink(Protocol):
    """Takes events, in the order of their sequence numbers and never two at once."""

    def write(self, event: Event) -> None:
        """Takes one event."""
        ...

    def close(self) -> None:
        """Frees what the sink holds; closing twice is allowed, writing afterwards is not."""
        ...


class NullSink:
    """Takes events and does nothing; a :class:`Telemetry` over it makes none in the first place."""

    def write(self, event: Event) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class MemorySink:
    """Keeps the newest ``limit`` events in memory; older ones are let go."""

    def __init__(self, limit: int = 10_000) -> None:
        if limit < 1:
            raise ConfigError(f"MemorySink: limit is {limit}; give at least 1")
        self._events: deque[Event] = deque(maxlen=limit)

    @property
    def events(self) -> list[Event]:
        """The kept events, oldest first."""
        return list(self._events)

    def write(self, event: Event) -> None:
        """Keeps one event."""
        self._events.append(event)

    def close(self) -> None:
        """Does nothing: the events stay readable."""


class JsonlSink:
    """Appends one JSON object per line to a file; every line reaches the file at once.

    Raises:
        InputError: the file cannot be opened or written.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torn = _ends_within_a_line(self.path)
            self._file = self.path.open("a", encoding="utf-8", buffering=1, newline="\n")
            if torn:
                self._file.write("\n")
        except OSError as error:
            raise InputError(f"{self.path}: events cannot be written there: {error}") from None

    def write(self, event: Event) -> None:
        """Appends one event; fields without a value are left out of the line."""
        try:
            self._file.write(event.model_dump_json(exclude_none=True) + "\n")
            self._file.flush()
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: the event cannot be written: {error}") from None

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _ends_within_a_line(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class FanOut:
    """Hands every event to several sinks, in the given order."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def write(self, event: Event) -> None:
        """Writes one event to every sink."""
        for sink in self._sinks:
            sink.write(event)

    def close(self) -> None:
        """Closes every sink."""
        for sink in self._sinks:
            sink.close()


def read_events(path: Path | str) -> Iterator[Event]:
    """Yields the events of a file that :class:`JsonlSink` wrote, oldest first.

    A last line without its newline is still being written and is left out.

    Raises:
        InputError: the file cannot be read, or a line is no event; the message has the line number.
    """
    try:
        with Path(path).open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.endswith("\n"):
                    return
                yield parse_event(line, f"{path}, line {number}")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the events cannot be read: {error}") from None
