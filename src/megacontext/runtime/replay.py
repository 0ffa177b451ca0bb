"""Repeats a recorded session on a new memory and compares it, outcome by outcome."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

from megacontext.config import FrozenConfig
from megacontext.errors import InvariantError, MegaContextError, ModelError
from megacontext.runtime.recording import CallRecorder, describe_models, describe_platform
from megacontext.runtime.recording_format import (
    Call,
    GenerateCall,
    Line,
    Outcome,
    RefocusCall,
    SessionHeader,
    read_calls,
    read_header,
)
from megacontext.runtime.session import Session, SessionConfig

_MEMORY = "replay.mctx"
_SHOWN = 60


class ReplayConfig(FrozenConfig):
    """What ``tools.replay_session`` repeats.

    Attributes:
        recording: a file of :class:`SessionRecording`.
        folder: where the memory is made and kept; a temporary one if not given.
    """

    recording: Path
    folder: Path | None = None


@dataclass(frozen=True)
class ReplayReport:
    """A session that was repeated without a difference.

    Attributes:
        calls: how many there were.
        refocuses: of all calls together.
        tokens: written by all answers together.
    """

    calls: int
    refocuses: int
    tokens: int


def replay(recording: Path, folder: Path) -> ReplayReport:
    """Repeats a recorded session; everything that it did must come again, to the last bit.

    The models are loaded by the names in the recording; telemetry is not written.

    Args:
        recording: a file of :class:`SessionRecording`.
        folder: where the memory is made, as ``replay.mctx``.

    Raises:
        InputError: the recording is damaged or not whole; nothing was run.
        ModelError: a model cannot be loaded, or is not the recorded one; nothing was run.
        InvariantError: an outcome differs; says in which line, of which call, and how.
        MemoryStoreError: the memory cannot be made.
    """
    header = read_header(recording)
    for _ in read_calls(recording):
        pass  # whatever is damaged shows before the first call is repeated
    config = SessionConfig.parse(header.config | {"telemetry": None}, where=str(recording))
    calls = refocuses = tokens = 0
    with Session(config) as session:
        _require_models(recording, header, session)
        engine = session.create(folder / _MEMORY)
        with engine.memory:
            written: list[Line] = []
            repeated = CallRecorder(engine, written.append)
            for number, call, outcome in read_calls(recording):
                written.clear()
                _repeat(repeated, call, outcome)
                difference = first_difference(outcome.values(), written[-1].values())
                if difference is not None:
                    raise InvariantError(
                        f"{recording}: line {number}, call {call.number} ({call.name}): "
                        f"{difference}{_other_platform(header)}"
                    )
                calls += 1
                refocuses += len(outcome.refocuses)
                tokens += len(outcome.tokens)
    return ReplayReport(calls, refocuses, tokens)


def first_difference(recorded: Any, now: Any, where: str = "") -> str | None:
    """Where two plain values differ first, in a few words; ``None`` if they do not."""
    if isinstance(recorded, dict) and isinstance(now, dict):
        recorded, now = cast(dict[str, Any], recorded), cast(dict[str, Any], now)
        pairs = [
            (f"{where}.{key}" if where else key, value, now.get(key))
            for key, value in recorded.items()
        ]
    elif isinstance(recorded, list) and isinstance(now, list):
        missing = "nothing"
        both = zip_longest(cast(list[Any], recorded), cast(list[Any], now), fillvalue=missing)
        pairs = [(f"{where}[{index}]", *pair) for index, pair in enumerate(both)]
    elif repr(recorded) == repr(now):  # also of what is not a number
        return None
    else:
        return f"{where} is {_shown(now)}, recorded is {_shown(recorded)}"
    found = (first_difference(old, new, place) for place, old, new in pairs)
    return next((difference for difference in found if difference is not None), None)


def _repeat(repeated: CallRecorder, call: Call, outcome: Outcome) -> None:
    try:
        if isinstance(call, RefocusCall):
            repeated.refocus(call.query, reserve=call.reserve)
        elif isinstance(call, GenerateCall):
            options = call.model_dump(
                include={"max_new_tokens", "stop", "query", "look_again", "remember", "seed"}
            )
            options |= call.sampling
            if call.name == "ask":
                repeated.ask(call.prompt, **options)
            else:
                _take(repeated.generate(call.prompt, **options), outcome)
        elif call.name == "ingest":
            repeated.ingest(call.text, call.source)
        else:
            _take(repeated.stream(call.text, call.source), outcome)
    except MegaContextError:
        pass  # part of the outcome, as it may have been then


def _take(steps: Iterator[object], outcome: Outcome) -> None:
    """Takes as much of a stream or an answer as was taken when it was recorded."""
    left_early = not outcome.ended and outcome.error is None
    for count, _ in enumerate(steps, start=1):
        if left_early and count >= outcome.taken:
            break
    cast(Any, steps).close()


def _require_models(recording: Path, header: SessionHeader, session: Session) -> None:
    difference = first_difference(header.models, dict(describe_models(session)))
    if difference is not None:
        raise ModelError(
            f"{recording}: the models are not the recorded ones: {difference}; put those back, or "
            "record again"
        )


def _other_platform(header: SessionHeader) -> str:
    difference = first_difference(header.platform, dict(describe_platform()))
    return "" if difference is None else f" (and {difference}, which may be the reason)"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
