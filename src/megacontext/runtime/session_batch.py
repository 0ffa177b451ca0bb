"""Several sessions over one base model, decoded in lockstep."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megacontext.closing import Closing
from megacontext.errors import InputError
from megacontext.runtime.answer import DecodedToken
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.batch_cache import BatchCache, turns_by_length
from megacontext.runtime.decoding import Decoding
from megacontext.runtime.engine import Engine

# Tokens read between two copies of all caches, if none is read anew meanwhile.
_ROOM = 32


@dataclass(eq=False)
class _Session:
    """One answer of the batch; ``logits [vocab]`` of its next token, once they are known."""

    engine: Engine
    decoding: Decoding
    logits: Tensor | None = None


class SessionBatch(Closing):
    """Decodes answers of several sessions, with one forward of the base per token for all of them.

    Each session is an :class:`Engine` with its own memory, focus, settings and prompt. Its answer
    is that of :meth:`Engine.generate`, but for rounding: a batch adds numbers up in another order.
    Sessions differ in whatever they like, may join while others decode, and leave when their answer
    ends. Windows are focused and read one by one: even a single one keeps a processor busy, and
    padding to the longest would cost more than it saves.

    Leave the ``with`` block, or call :meth:`close`, to end answers that are not complete.

    >>> import pathlib, tempfile
    >>> from megacontext import Session, SessionConfig
    >>> session = Session(SessionConfig(model="bundled:tiny"))
    >>> folder = tempfile.TemporaryDirectory()
    >>> names = ("lantern", "kettle")
    >>> engines = [session.create(pathlib.Path(folder.name) / f"{name}.mctx") for name in names]
    >>> for name, engine in zip(names, engines):
    ...     _ = engine.ingest(f"The secret code of the rusty {name} is 48213. " * 3)
    >>> answers = ["", ""]
    >>> with SessionBatch(session.base) as batch:
    ...     for engine in engines:
    ...         _ = batch.add(engine, "The secret", stop=" is", max_new_tokens=16, remember=False)
    ...     for index, token in batch:
    ...         answers[index] += token.text
    >>> answers
    [' code of the rusty lantern', ' code of the rusty kettle']
    >>> for engine in engines:
    ...     engine.memory.close()
    >>> session.close(); folder.cleanup()

    Args:
        base: the model that all sessions share.
    """

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        self._sessions: dict[int, _Session] = {}
        self._added = 0
        self._given: list[tuple[int, DecodedToken]] = []
        self._apart = turns_by_length(base)
        # What the sessions have read, a row each; rows that are current are ahead of the readings.
        self._cache: BatchCache | None = None
        self._rows: dict[int, int] = {}
        self._current: set[int] = set()

    @property
    def sessions(self) -> tuple[int, ...]:
        """Those whose answers are not complete, by the numbers that :meth:`add` gave."""
        return tuple(self._sessions)

    def add(self, engine: Engine, prompt: str = "", **options: Any) -> int:
        """Begins an answer, which takes part from the next :meth:`step` on.

        Args:
            engine: the session; nothing else may use it until its answer is complete.
            prompt: text that follows its history.
            options: those of :meth:`Engine.generate`.

        Returns:
            The number of the session in this batch, counted from 0.

        Raises:
            InputError: the engine has another base, or it or its memory is in use by the batch.
            MegaContextError: as :meth:`Engine.generate` for prompt and options.
        """
        if engine.base is not self.base:
            raise InputError(
                f"the session's base model ({engine.base.name}) is not the batch's own "
                f"({self.base.name}); load the model once and give it to every engine"
            )
        for index, other in self._sessions.items():
            remember = options.get("remember", True) or other.decoding.remember
            if other.engine is engine or (remember and other.engine.memory is engine.memory):
                raise InputError(
                    f"{engine.memory.path.name}: session {index} of the batch uses it; add it once "
                    "that answer is complete"
                )
        decoding = engine.begin(prompt, **options)
        self._disband()
        index, self._added = self._added, self._added + 1
        self._sessions[index] = _Session(engine, decoding)
        return index

    def step(self) -> list[tuple[int, DecodedToken]]:
        """Decodes one token of every session.

        Returns:
            ``(session, token)`` of what is known to belong to an answer: none, one or several
            tokens per session, as :meth:`Engine.generate` gives them out.

        Raises:
            MegaContextError: a session cannot go on, as :meth:`Engine.generate`. It has left the
                batch; the others lose nothing and go on with the next step.
        """
        for index, session in list(self._sessions.items()):
            if session.logits is None and session.decoding.due:
                with self._leaving_on_error(index):
                    self._catch_up(index)
                    session.logits = session.engine.look(session.decoding)
        self._read_newest()
        for index, session in list(self._sessions.items()):
            logits, session.logits = session.logits, None
            if logits is None:
                continue
            with self._leaving_on_error(index):
                tokens = session.engine.take(session.decoding, logits)
                self._given.extend((index, token) for token in tokens)
            if session.decoding.ended:
                self.stop(index)
        given, self._given = self._given, []
        return given

    def stop(self, index: int) -> None:
        """Ends the answer of a session where it is; what was given out is remembered, if asked.

        Raises:
            InputError: no such session is decoding.
        """
        if index not in self._sessions:
            raise InputError(f"session {index} of the batch is not decoding")
        session = self._sessions.pop(index)
        self._current.discard(index)
        try:
            self._disband()
        finally:
            session.engine.end(session.decoding)

    def close(self) -> None:
        """Ends all answers where they are; see :meth:`stop`."""
        with ExitStack() as stack:
            for index in self._sessions:
                stack.callback(self.stop, index)

    def __iter__(self) -> Iterator[tuple[int, DecodedToken]]:
        """The tokens of all sessions, step by step, until all answers are complete."""
        while self._sessions or self._given:
            yield from self.step()

    def _read_newest(self) -> None:
        """Reads the newest token of every session that has no logits yet."""
        waiting = {i: session for i, session in self._sessions.items() if session.logits is None}
        if not waiting:
            return
        if self._apart or len(self._sessions) == 1:
            for session in waiting.values():
                session.logits = session.decoding.step()
            return
        logits = self._gathered().step(
            {self._rows[i]: int(session.decoding.answer.said[-1]) for i, session in waiting.items()}
        )
        for index, session in waiting.items():
            session.logits = logits[self._rows[index]]

    def _gathered(self) -> BatchCache:
        """One cache of what all sessions have read."""
        behind = [index for index in self._sessions if index not in self._current]
        caches = [self._sessions[index].decoding.reading.cache for index in behind]
        cache = self._cache
        if cache is None or not cache.has_room(caches):
            self._disband()
            self._rows = {index: row for row, index in enumerate(self._sessions)}
            cache = self._cache = BatchCache(
                self.base,
                [session.decoding.reading.cache for session in self._sessions.values()],
                _ROOM,
            )
        else:
            for index, own in zip(behind, caches, strict=True):
                cache.place(self._rows[index], own)
        self._current = set(self._sessions)
        return cache

    def _catch_up(self, index: int) -> None:
        """Gives a session's own reading what was read for it in the batch."""
        if self._cache is None or index not in self._current:
            return
        self._current.remove(index)
        tokens, cache = self._cache.grown(self._rows[index])
        if len(tokens):
            self._sessions[index].decoding.reading.follow(tokens, cache)

    def _disband(self) -> None:
        """Lets every session's own reading catch up; the batch's cache is made anew."""
        for index in list(self._current):
            self._catch_up(index)
        self._cache = None

    @contextmanager
    def _leaving_on_error(self, index: int) -> Generator[None]:
        try:
            yield
        except BaseException:
            self.stop(index)
            raise
