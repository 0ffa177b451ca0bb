"""The lines of a recorded session: what was asked of an engine, and what came of it.

A recording is JSON lines in UTF-8: a :class:`SessionHeader`, then for every call the call and its
:class:`Outcome`, then a :class:`RecordingEnd`. The header and the calls carry a checksum, since a
replay acts on them; outcomes carry none, since a replay compares them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel as PydanticModel
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from megacontext.errors import InputError
from megacontext.memory import Source
from megacontext.runtime.focus_loop import FocusRecord
from megacontext.runtime.focus_scores import Edit

FORMAT: Final = "megacontext-recording"
FORMAT_VERSION: Final = 1

Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
SamplingValue = bool | int | float | tuple[int, ...] | None


class _Line(PydanticModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> str:
        """The line, without its end; ASCII only, so that half a surrogate pair can stand in it."""
        return json.dumps(self.values())

    def values(self) -> dict[str, Any]:
        """The line as plain numbers, texts, lists and mappings."""
        return self.model_dump(mode="json")


class _SealedLine(_Line):
    sha256: str = ""

    def digest(self) -> str:
        """SHA-256 of everything else in the line, in hexadecimal digits."""
        values = self.values()
        del values["sha256"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def sealed(self) -> Self:
        """The same line with its checksum."""
        return self.model_copy(update={"sha256": self.digest()})


class SessionHeader(_SealedLine):
    """The first line: what made the session.

    Attributes:
        version: of the format.
        config: a dumped ``SessionConfig``.
        models: names, versions and sizes of the models, and the tokenizer's hash.
        platform: versions of libraries and the number of threads. Another platform may round sums
            otherwise; it is named where a replay differs, and is no reason to refuse one.
    """

    kind: Literal["session"] = "session"
    format: Literal["megacontext-recording"] = FORMAT
    version: Literal[1] = FORMAT_VERSION
    config: dict[str, Any]
    models: dict[str, str | int]
    platform: dict[str, str | int]


class _Call(_SealedLine):
    kind: Literal["call"] = "call"
    number: Count


class TextCall(_Call):
    """:meth:`Engine.ingest` or :meth:`Engine.stream`; a stream of texts is a list."""

    name: Literal["ingest", "stream"]
    text: str | tuple[str, ...]
    source: Source | None


class RefocusCall(_Call):
    """:meth:`Engine.refocus`."""

    name: Literal["refocus"]
    query: str
    reserve: int


class GenerateCall(_Call):
    """:meth:`Engine.generate` or :meth:`Engine.ask`; the seed is always written."""

    name: Literal["generate", "ask"]
    prompt: str
    max_new_tokens: int = 256
    stop: str = ""
    query: str = ""
    look_again: str = ""
    remember: bool = True
    seed: Seed = 0
    sampling: dict[str, SamplingValue] = {}


Call = TextCall | RefocusCall | GenerateCall


class RefocusLine(_Line):
    """One refocus, as :class:`FocusRecord` has it, without its proposals."""

    round: Count
    cursor: Count
    policy: str
    cost: Count
    edits: tuple[Edit, ...]
    spans: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, record: FocusRecord) -> Self:
        """The record as plain numbers."""
        return cls(
            round=record.round,
            cursor=record.cursor,
            policy=record.policy,
            cost=record.cost,
            edits=record.edits,
            spans=tuple((level, start, end) for level, start, end in record.spans.tolist()),
        )


class Outcome(_Line):
    """What a call gave and where the session stood behind it.

    Attributes:
        number: of the call.
        error: class of the error that it raised.
        refocuses: since the call before.
        tokens: ids of what was written.
        text: what was written.
        taken: refocuses or tokens that the caller took.
        ended: whether the caller took everything that a stream or an answer had to give.
        n_tokens: tokens in the memory.
        cost: token-equivalents of the working context.
    """

    kind: Literal["outcome"] = "outcome"
    number: Count
    error: str | None = None
    refocuses: tuple[RefocusLine, ...] = ()
    tokens: tuple[int, ...] = ()
    text: str = ""
    taken: Count = 0
    ended: bool = True
    n_tokens: Count
    cost: Count


class RecordingEnd(_Line):
    """The last line of a recording that is whole."""

    kind: Literal["end"] = "end"
    calls: Count


Line = SessionHeader | Call | Outcome | RecordingEnd
_KINDS: Final = {"outcome": Outcome, "end": RecordingEnd}
_CALL: TypeAdapter[Call] = TypeAdapter(Annotated[Call, Field(discriminator="name")])


def new_call(**values: Any) -> Call:
    """A call with its checksum.

    Raises:
        InputError: an argument is of a type that cannot be written down.
    """
    try:
        return _CALL.validate_python(values).sealed()
    except ValidationError as error:
        raise InputError(f"{values['name']} cannot be recorded: {_first_problem(error)}") from None


def read_header(path: Path) -> SessionHeader:
    """The first line of a recording.

    Raises:
        InputError: the file cannot be read, or is no recording of this format version.
    """
    return _header(path, next(_lines(path), (1, None))[1])


def read_calls(path: Path) -> Iterator[tuple[int, Call, Outcome]]:
    """The calls of a recording, one at a time, however long it is.

    Yields:
        The number of the outcome's line, counted from one, the call and the outcome.

    Raises:
        InputError: a line is damaged, missing, or stands in a wrong place.
    """
    lines = _lines(path)
    _header(path, next(lines, (1, None))[1])
    call: Call | None = None
    calls, last = 0, 1
    for last, values in lines:
        line = _line(path, last, values)
        if isinstance(line, RecordingEnd):
            if call is not None or line.calls != calls:
                raise _damaged(path, last, f"it ends after {line.calls} calls, here are {calls}")
            if next(lines, None) is not None:
                raise _damaged(path, last + 1, "there is something behind the end")
            return
        if isinstance(line, Outcome) == (call is None) or line.number != calls:
            raise _damaged(path, last, "a line before it is missing or stands twice")
        if isinstance(line, Outcome):
            assert call is not None
            yield last, call, line
            call, calls = None, calls + 1
        else:
            call = line
    raise InputError(
        f"{path}: ends after line {last} without its last line; the session was cut off, or the "
        "file was: record again, or give a whole copy"
    )


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    values = None
                if not isinstance(values, dict) or not line.endswith(b"\n"):
                    raise _damaged(path, number, "it is no whole JSON object")
                yield number, values
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _header(path: Path, values: dict[str, Any] | None) -> SessionHeader:
    if values is None or values.get("format") != FORMAT:
        raise InputError(f"{path}: no recording of a session; give a file that `record=` wrote")
    if values.get("version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: has format version {values.get('version')!r}, this program reads "
            f"{FORMAT_VERSION}; record again"
        )
    try:
        header = SessionHeader.model_validate(values)
    except ValidationError as error:
        raise _damaged(path, 1, _first_problem(error)) from None
    _check_seal(path, 1, header)
    return header


def _line(path: Path, number: int, values: dict[str, Any]) -> Call | Outcome | RecordingEnd:
    try:
        kind = _KINDS.get(str(values.get("kind")))
        if kind is not None:
            return kind.model_validate(values)
        call = _CALL.validate_python(values)
    except ValidationError as error:
        raise _damaged(path, number, _first_problem(error)) from None
    _check_seal(path, number, call)
    return call


def _check_seal(path: Path, number: int, line: _SealedLine) -> None:
    if line.sha256 != line.digest():
        what = "configuration or a model" if number == 1 else "an argument of the call"
        raise _damaged(path, number, f"{what} is not what the checksum was made of")


def _damaged(path: Path, number: int, problem: str) -> InputError:
    return InputError(
        f"{path}: line {number} is damaged ({problem}); give a whole copy, or record again"
    )


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    message = " ".join(first["msg"].split())
    return f"{key}: {message}" if key else message
