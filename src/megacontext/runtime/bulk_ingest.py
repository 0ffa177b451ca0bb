"""Takes many documents into a memory, and goes on where an earlier call was cut off."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from megacontext.config import FrozenConfig
from megacontext.errors import InputError
from megacontext.memory import Memory, Source, SourcePart, SourceRecord
from megacontext.runtime.ingest import Ingestor
from megacontext.runtime.read_ahead import Piece, ReadAhead, read_pieces

BulkProgress = Callable[[int, int], None]
"""Told of every commit: tokens, and bytes of text that are done with since the last call."""


class IngestConfig(FrozenConfig):
    """How files are read.

    Attributes:
        readers: files that are read and tokenized at the same time, ahead of their gists.
    """

    readers: int = Field(default=2, ge=1, le=64)


@dataclass(frozen=True)
class Document:
    """A text to take in.

    Attributes:
        source: what is recorded about it. One with a SHA-256 is known again by that and its URI.
        open: begins to read it.
        size: its bytes, where they are known; skipped ones are told to the progress.
        waits: whether reading may wait for somebody, as for standard input; such a document is
            read when its turn comes, and not ahead.
    """

    source: Source
    open: Callable[[], Iterable[str]]
    size: int = 0
    waits: bool = False


@dataclass(frozen=True)
class TakenIn:
    """What a call did with a document.

    Attributes:
        source: its source.
        start: its first token of this call.
        tokens: tokens that this call took in.
        known: tokens that were there already, from a call that was cut off; the rest followed.
        skipped: whether it was complete before, and nothing had to be done.
    """

    source: Source
    start: int
    tokens: int
    known: int
    skipped: bool = False


@dataclass(frozen=True)
class _Plan:
    """What is to be done with a document, and the stretches of it that the memory holds."""

    document: Document
    parts: tuple[SourceRecord, ...] = ()
    skipped: bool = False

    @property
    def known(self) -> int:
        return sum(part.end - part.start for part in self.parts)


def ingest_documents(
    ingestor: Ingestor,
    documents: Sequence[Document],
    *,
    readers: int = 2,
    again: bool = False,
    progress: BulkProgress | None = None,
) -> list[TakenIn]:
    """Appends documents, several to a commit where they are short.

    A document whose source is complete in the memory, by URI and SHA-256, is skipped. One whose
    source is incomplete goes on behind the tokens that are there, as the same source if nothing
    followed it, else as a further one with the same URI and SHA-256. So the same call after one
    that was cut off takes in what is missing, no more and no less.

    Args:
        ingestor: appends to a memory open for writing.
        documents: in the order in which they are to be taken in.
        readers: how many are read and tokenized at the same time, ahead of gists and commits.
        again: takes complete documents in once more.
        progress: called with the tokens and bytes of every commit.

    Returns:
        One for each document.

    Raises:
        InputError: a document cannot be read, or does not begin with the tokens that an incomplete
            source has; what was committed before stands.
        MemoryStoreError: a commit failed; all commits before it stand.
    """
    plans = _plans(ingestor.memory, documents, again=again)
    ahead = [plan.document.open for plan in plans if not plan.skipped and not plan.document.waits]
    tokenizer = ingestor.base.tokenizer
    commits = _Commits(ingestor, progress)
    done: list[TakenIn] = []
    with ReadAhead(ahead, tokenizer, readers=readers) as reading:
        for plan in plans:
            document = plan.document
            if plan.skipped:
                commits.pass_by(document.size)
                done.append(TakenIn(document.source, commits.n_tokens, 0, 0, skipped=True))
                continue
            if document.waits:
                pieces = read_pieces(document.open(), tokenizer)
            else:
                pieces = reading.next_document()
            start = commits.n_tokens
            _take_in(ingestor.memory, plan, pieces, commits)
            done.append(TakenIn(document.source, start, commits.n_tokens - start, plan.known))
        commits.flush()
    return done


def _plans(memory: Memory, documents: Sequence[Document], *, again: bool) -> list[_Plan]:
    complete: set[tuple[str, str]] = set()
    begun: dict[tuple[str, str], list[SourceRecord]] = {}
    for record in memory.sources():
        key = (record.uri, record.sha256)
        if record.complete:
            complete.add(key)
        else:
            begun.setdefault(key, []).append(record)
    plans: list[_Plan] = []
    for document in documents:
        key = (document.source.uri, document.source.sha256)
        if not document.source.sha256:
            plans.append(_Plan(document))
        elif key in begun:
            plans.append(_Plan(document, tuple(begun.pop(key))))
            complete.add(key)
        else:
            plans.append(_Plan(document, skipped=key in complete and not again))
            complete.add(key)
    return plans


def _take_in(memory: Memory, plan: _Plan, pieces: Iterable[Piece], commits: _Commits) -> None:
    """Hands on what the memory does not have of a document."""
    source_id: int | None = None
    for piece in _behind(memory, plan, pieces):
        if source_id is None and len(piece.tokens):
            last = plan.parts[-1] if plan.parts else None
            if last is not None and last.end == commits.n_tokens:
                source_id = last.id
            else:
                source_id = memory.begin_source(plan.document.source)
        commits.add(source_id, piece)


def _behind(memory: Memory, plan: _Plan, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces behind the tokens that the memory has, which they must begin with."""
    stored = iter(plan.parts)
    part = next(stored, None)
    at = part.start if part is not None else 0
    for piece in pieces:
        tokens = piece.tokens
        while part is not None and len(tokens):
            count = min(len(tokens), part.end - at)
            if not torch.equal(memory.tokens(at, at + count), tokens[:count]):
                raise _other_tokens(plan)
            tokens, at = tokens[count:], at + count
            if at == part.end:
                part = next(stored, None)
                at = part.start if part is not None else 0
        if plan.parts and not piece.more and (part is not None or not len(tokens)):
            raise _other_tokens(plan)
        yield replace(piece, tokens=tokens)


def _other_tokens(plan: _Plan) -> InputError:
    uri = plan.document.source.uri
    return InputError(
        f"{uri}: {plan.known} tokens of it were taken in before, but its text makes others now; "
        f"`megacontext forget MEMORY --source {uri}` removes them, then take it in again"
    )


class _Commits:
    """Gathers the tokens of documents, and commits them in pieces of the ingestor's size."""

    def __init__(self, ingestor: Ingestor, progress: BulkProgress | None) -> None:
        self.ingestor = ingestor
        self.progress = progress
        self.waiting = 0
        self._held: deque[tuple[int | None, Piece]] = deque()

    @property
    def n_tokens(self) -> int:
        """Tokens of the memory once everything given is committed."""
        return self.ingestor.memory.n_tokens + self.waiting

    def add(self, source_id: int | None, piece: Piece) -> None:
        """Takes a piece of a source, and commits while there is enough for that."""
        self._held.append((source_id, piece))
        self.waiting += len(piece.tokens)
        while self.waiting >= self.ingestor.chunk_tokens:
            self._commit()

    def pass_by(self, size: int) -> None:
        """Counts bytes that there is nothing to do for."""
        if self.progress is not None:
            self.progress(0, size)

    def flush(self) -> None:
        """Commits the rest."""
        while self._held:
            self._commit()

    def _commit(self) -> None:
        tokens: list[Tensor] = []
        parts: list[SourcePart] = []
        room, size = self.ingestor.chunk_tokens, 0
        while self._held and room:
            source_id, piece = self._held.popleft()
            count = min(room, len(piece.tokens))
            rest = piece.tokens[count:]
            if len(rest):
                self._held.appendleft((source_id, replace(piece, tokens=rest)))
            else:
                size += piece.size
            if count:
                _add_part(parts, SourcePart(source_id, count, bool(len(rest)) or piece.more))
                tokens.append(piece.tokens[:count])
                room -= count
        taken = sum(part.count for part in parts)
        if taken:
            self.ingestor.append_parts(torch.cat(tokens), parts)
            self.waiting -= taken
        if self.progress is not None:
            self.progress(taken, size)


def _add_part(parts: list[SourcePart], part: SourcePart) -> None:
    """Adds a part; what goes on with the source before it is one part with it."""
    last = parts[-1] if parts else None
    if last is not None and last.source_id == part.source_id and part.source_id is not None:
        parts[-1] = replace(part, count=last.count + part.count)
    else:
        parts.append(part)
