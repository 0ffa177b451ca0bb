"""Writes a session down, call by call, so that it can be repeated and compared."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch
import transformers

from megacontext.checkpoints import hash_weights
from megacontext.closing import Closing
from megacontext.errors import InputError, MegaContextError
from megacontext.memory import Source
from megacontext.runtime.answer import DecodedToken
from megacontext.runtime.engine import Engine
from megacontext.runtime.focus_loop import FocusRecord
from megacontext.runtime.focus_scores import FocusPlan
from megacontext.runtime.ingest import Ingested
from megacontext.runtime.recording_format import (
    Call,
    Line,
    Outcome,
    RecordingEnd,
    RefocusLine,
    SessionHeader,
    new_call,
)
from megacontext.runtime.session import Session

T = TypeVar("T")

_FILE_MODE: Final = 0o600
_GENERATE_OPTIONS: Final = frozenset(
    {"max_new_tokens", "stop", "query", "look_again", "remember", "seed"}
)


@dataclass
class _Notes:
    """What is known of a call's outcome while it runs."""

    error: str | None = None
    ended: bool = True
    taken: int = 0
    text: list[str] = field(default_factory=list[str])
    tokens: list[int] = field(default_factory=list[int])
    refocuses: list[RefocusLine] = field(default_factory=list[RefocusLine])


class CallRecorder:
    """An engine whose calls are written down, one at a time.

    The methods are those of :class:`Engine`, with the same arguments. A call that raises an error
    of this package, or whose stream or answer is left early, is an outcome as any other.

    Args:
        engine: does the work; nothing else may use it meanwhile.
        write: takes each line.
    """

    def __init__(self, engine: Engine, write: Callable[[Line], None]) -> None:
        self.engine = engine
        self.n_calls = 0
        self._write = write
        self._running = False
        self._seen = engine.focus.state.round

    @property
    def running(self) -> bool:
        """Whether a call has begun and its outcome is not written."""
        return self._running

    def ingest(self, text: str | Iterable[str], source: Source | None = None) -> Ingested:
        """:meth:`Engine.ingest`; a stream of texts is read to its end first."""
        text = text if isinstance(text, str) else tuple(text)
        with self._call(name="ingest", text=text, source=source):
            return self.engine.ingest(text, source)

    def stream(
        self, text: str | Iterable[str], source: Source | None = None
    ) -> Iterator[FocusRecord]:
        """:meth:`Engine.stream`; a stream of texts is read to its end first."""
        text = text if isinstance(text, str) else tuple(text)
        with (
            self._call(name="stream", text=text, source=source) as notes,
            closing(_closable(self.engine.stream(text, source))) as records,
        ):
            for record in records:
                notes.taken += 1
                # Now, since the engine keeps the newest records only.
                self._note_refocuses(notes)
                yield record

    def refocus(self, query: str = "", *, reserve: int = 0) -> FocusPlan:
        """:meth:`Engine.refocus`."""
        with self._call(name="refocus", query=query, reserve=reserve):
            return self.engine.refocus(query, reserve=reserve)

    def generate(self, prompt: str = "", **options: Any) -> Iterator[DecodedToken]:
        """:meth:`Engine.generate`."""
        return self._generate("generate", prompt, options)

    def ask(self, prompt: str, **options: Any) -> str:
        """:meth:`Engine.ask`."""
        options.setdefault("remember", False)
        return "".join(token.text for token in self._generate("ask", prompt, options))

    def _generate(self, name: str, prompt: str, options: dict[str, Any]) -> Iterator[DecodedToken]:
        own = {key: value for key, value in options.items() if key in _GENERATE_OPTIONS}
        sampling = {key: value for key, value in options.items() if key not in own}
        with (
            self._call(name=name, prompt=prompt, sampling=sampling, **own) as notes,
            closing(_closable(self.engine.generate(prompt, **options))) as tokens,
        ):
            for token in tokens:
                notes.taken += 1
                notes.text.append(token.text)
                notes.tokens.append(token.id)
                yield token

    @contextmanager
    def _call(self, **values: Any) -> Generator[_Notes]:
        """Writes the call, then what was noted of it while the body ran."""
        if self._running:
            raise InputError("a call of this recording has not ended; take or close it first")
        call: Call = new_call(number=self.n_calls, **values)
        self._write(call)
        self._running = True
        notes = _Notes()
        # Anything else, such as Ctrl-C, cannot be repeated: the recording ends there, unfinished.
        try:
            yield notes
        except MegaContextError as error:
            notes.error = type(error).__name__
            notes.ended = False
            self._end(notes)
            raise
        except GeneratorExit:
            notes.ended = False
            self._end(notes)
            raise
        self._end(notes)

    def _end(self, notes: _Notes) -> None:
        self._note_refocuses(notes)
        self._write(
            Outcome(
                number=self.n_calls,
                error=notes.error,
                ended=notes.ended,
                taken=notes.taken,
                text="".join(notes.text),
                tokens=tuple(notes.tokens),
                refocuses=tuple(notes.refocuses),
                n_tokens=self.engine.memory.n_tokens,
                cost=self.engine.context.cost,
            )
        )
        self.n_calls += 1
        self._running = False

    def _note_refocuses(self, notes: _Notes) -> None:
        new: list[FocusRecord] = []
        for record in reversed(self.engine.focus.records):
            if record.round <= self._seen:
                break
            new.append(record)
        notes.refocuses.extend(RefocusLine.of(record) for record in reversed(new))
        self._seen = self.engine.focus.state.round


class SessionRecording(CallRecorder, Closing):
    """A session over a new memory that is written to a file as it goes, for :func:`replay`.

    Unlike telemetry, the file holds the content: texts, prompts and answers. Nobody but its owner
    can read it (mode 0600); keep it as the memory itself. Random numbers are drawn for sampling
    alone, from the seed written with every answer.

    Args:
        session: models and habits.
        memory: where the memory is made.
        path: the file; there must be none yet.

    Raises:
        InputError: the file is there already or cannot be written.
        MemoryStoreError: the memory cannot be made.
        ConfigError, CheckpointError: the session's models and sizes do not fit together.
    """

    def __init__(self, session: Session, memory: Path, path: Path) -> None:
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._file = os.fdopen(os.open(path, flags, _FILE_MODE), "w", encoding="ascii")
        except FileExistsError:
            raise InputError(f"{path}: is there already; remove it, or name another file") from None
        except OSError as error:
            raise self._unwritable(error) from None
        header = SessionHeader(
            config=session.config.model_dump(mode="json"),
            models=describe_models(session),
            platform=describe_platform(),
        )
        try:
            self._append(header.sealed())
            engine = session.create(memory)
        except MegaContextError:
            self._file.close()
            path.unlink()
            raise
        super().__init__(engine, self._append)

    def close(self) -> None:
        """Ends the recording and closes the memory; closing twice is allowed."""
        try:
            if not self._file.closed and not self.running:
                self._append(RecordingEnd(calls=self.n_calls))
        finally:
            self._file.close()
            self.engine.memory.close()

    def _append(self, line: Line) -> None:
        if self._file.closed:
            if isinstance(line, Outcome):
                return  # of an answer that was let go after the recording had ended
            raise InputError(f"{self.path}: the recording has ended; start another")
        try:
            self._file.write(line.to_json() + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> InputError:
        return InputError(f"{self.path}: cannot be written: {error.strerror or error}")


def describe_models(session: Session) -> dict[str, str | int]:
    """Names, versions and sizes of a session's models, by what a memory knows them by."""
    identity = Engine.identity(session.base, session.gistnet, session.lens)
    return {
        "base_model": identity.base_model,
        "base_weights": hash_weights(session.base.model.state_dict()),
        "tokenizer_hash": identity.tokenizer_hash,
        "gist_version": session.gistnet.version,
        "lens_version": "none" if session.lens is None else session.lens.version,
        "block_size": identity.block_size,
        "gist_width": identity.gist_width,
        "key_width": identity.key_width,
    }


def describe_platform() -> dict[str, str | int]:
    """What may change how sums are rounded."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }


def _closable(steps: Iterator[T]) -> Generator[T]:
    return cast("Generator[T]", steps)  # the engine's iterators are generators
