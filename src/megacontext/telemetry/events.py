"""The event schema: one frozen model per kind of step, told apart by ``kind``."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel as PydanticModel
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from megacontext.errors import InputError

Count = Annotated[int, Field(ge=0)]
Milliseconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Nats = Annotated[float, Field(allow_inf_nan=False)]


class Span(NamedTuple):
    """Tokens ``[start, end)`` as one entry of ``level`` (0: a raw block); an array in JSON."""

    level: Count
    start: Count
    end: Count


class _Event(PydanticModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence: Count = Field(description="number of the event within its Telemetry, from 0, no gaps")
    time: float = Field(description="wall time of the event, seconds since 1970 (UTC)")
    generation: Count = Field(description="commit counter of the memory when the event happened")


class IngestEvent(_Event):
    """A text was taken in: ``tokens`` tokens at ``[start, start + tokens)``."""

    kind: Literal["ingest"] = "ingest"
    start: Count
    tokens: Count
    source_id: int | None = None
    ms: Milliseconds
    text: str | None = None


class GistEvent(_Event):
    """``count`` gists of ``level`` were made in one batch, the first with index ``first``."""

    kind: Literal["gist"] = "gist"
    level: Annotated[int, Field(ge=1)]
    first: Count
    count: Count
    ms: Milliseconds


class ScoreEvent(_Event):
    """A policy scored the working context and proposed blocks: ``scores[i]`` is for ``spans[i]``.

    Positive scores ask to expand, negative ones to collapse.
    """

    kind: Literal["score"] = "score"
    policy: str
    entries: Count
    spans: tuple[Span, ...] = ()
    scores: tuple[Nats, ...] = Field(default=(), description="nats, one per span")
    ms: Milliseconds

    @model_validator(mode="after")
    def _one_score_per_span(self) -> Self:
        if len(self.spans) != len(self.scores):
            raise ValueError(f"{len(self.spans)} spans but {len(self.scores)} scores")
        return self


class EditEvent(_Event):
    """Some entries of the working context made way for others that cover the same tokens."""

    kind: Literal["edit"] = "edit"
    action: Literal["expand", "collapse"]
    removed: tuple[Span, ...]
    added: tuple[Span, ...]
    score: Nats = Field(description="nats the edit was expected to win")
    cost_change: int = Field(description="token-equivalents; negative frees budget")
    reason: str


class RefocusEvent(_Event):
    """One round of score, allocate and cache repair."""

    kind: Literal["refocus"] = "refocus"
    round: Count
    policy: str
    cursor: Count
    entries: Count
    edits: Count
    cost: Count = Field(description="token-equivalents of the new working context")
    budget: Count
    recomputed: Count = Field(description="positions whose keys and values were computed anew")
    kv: str | None = Field(default=None, description="KV mode: exact or incremental")
    reason: str
    ms: Milliseconds


class DecodeEvent(_Event):
    """``tokens`` tokens were decoded at ``[start, start + tokens)``."""

    kind: Literal["decode"] = "decode"
    start: Count
    tokens: Count
    cost: Count = Field(description="token-equivalents of the working context that was read")
    ms: Milliseconds
    text: str | None = None


class CommitEvent(_Event):
    """The memory committed; ``generation`` is the new one."""

    kind: Literal["commit"] = "commit"
    tokens: Count = Field(description="tokens in the memory after the commit")
    levels: Count
    bytes_written: Count
    ms: Milliseconds


Event = Annotated[
    IngestEvent | GistEvent | ScoreEvent | EditEvent | RefocusEvent | DecodeEvent | CommitEvent,
    Field(discriminator="kind"),
]
_EVENT: TypeAdapter[Event] = TypeAdapter(Event)


def event_json_schema() -> dict[str, Any]:
    """Returns the JSON schema of one event, that is, of one line of a :class:`JsonlSink` file."""
    return _EVENT.json_schema()


def parse_event(line: str | bytes, where: str) -> Event:
    """Reads one event from its JSON.

    Raises:
        InputError: the line is no event; ``where`` opens the message.
    """
    try:
        return _EVENT.validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        detail = f"{key}: {first['msg']}" if key else first["msg"]
        raise InputError(
            f"{where}: not an event ({detail}); give a file written by JsonlSink"
        ) from None
