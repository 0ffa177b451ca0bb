"""Takes texts into a memory: tokens, gists of every level, keys and index, commit by commit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megacontext.errors import InputError
from megacontext.memory import Memory, Source, SourcePart
from megacontext.memory.file_set import header_for
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.gist_builder import BuiltGists, GistBuilder
from megacontext.runtime.text_pieces import text_pieces
from megacontext.telemetry import Telemetry

Progress = Callable[[int], None]
ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Ingested:
    """Tokens ``[start, end)`` that one call took in."""

    start: int
    end: int


class Ingestor:
    """Appends to one memory, in constant memory whatever the length of the text.

    Args:
        base: tokenizer and embeddings.
        builder: makes gists, keys and index texts.
        memory: open for writing.
        telemetry: told of every commit.
        chunk_tokens: most tokens per commit.
    """

    def __init__(
        self,
        base: BaseModel,
        builder: GistBuilder,
        memory: Memory,
        telemetry: Telemetry,
        *,
        chunk_tokens: int,
    ) -> None:
        self.base = base
        self.builder = builder
        self.memory = memory
        self.telemetry = telemetry
        self.chunk_tokens = chunk_tokens

    def ingest(
        self,
        text: str | Iterable[str],
        source: Source | None = None,
        progress: Progress | None = None,
    ) -> Ingested:
        """Appends a text, or a stream of texts which belong together.

        Args:
            text: any Unicode text.
            source: where it came from; recorded with the range of its tokens. It is incomplete
                until the last of them is committed.
            progress: called with the number of tokens of every commit.

        Raises:
            MemoryStoreError: a commit failed; all commits before it stand.
        """
        start = self.memory.n_tokens
        source_id = self.memory.begin_source(source) if source is not None else None
        for tokens, more in with_more(self.token_chunks(text, self.chunk_tokens)):
            self.append(tokens, source_id, progress, more=more)
        return Ingested(start, self.memory.n_tokens)

    def ingest_tokens(
        self,
        tokens: Tensor,
        source: Source | None = None,
        progress: Progress | None = None,
    ) -> Ingested:
        """Appends a history that is token ids ``[n]`` of the base already.

        The memory is the one that :meth:`ingest` makes of the text with these tokens.

        Args:
            tokens: int64 or int32.
            source: where they came from; recorded with their range.
            progress: called with the number of tokens of every commit.

        Raises:
            MemoryStoreError: a commit failed; all commits before it stand.
        """
        start = self.memory.n_tokens
        source_id = self.memory.begin_source(source) if source is not None else None
        if len(tokens):
            self.append(tokens, source_id, progress)
        return Ingested(start, self.memory.n_tokens)

    def token_chunks(self, text: str | Iterable[str], size: int) -> Iterator[Tensor]:
        """Tokenizes a stream: ``[size]`` int64 token ids at a time, the last chunk shorter."""
        held: list[Tensor] = []
        count = 0
        for piece in text_pieces(text):
            ids = self.base.encode(piece)
            held.append(ids)
            count += len(ids)
            if count >= size:
                ready = torch.cat(held)
                whole = count // size * size
                yield from ready[:whole].split(size)
                held, count = [ready[whole:]], count - whole
        if count:
            yield torch.cat(held)

    def append(
        self,
        tokens: Tensor,
        source_id: int | None = None,
        progress: Progress | None = None,
        *,
        more: bool = False,
    ) -> None:
        """Appends token ids ``[n]``, one commit per ``chunk_tokens``.

        Args:
            tokens: int64 or int32.
            source_id: number from :meth:`Memory.begin_source`.
            progress: called with the number of tokens of every commit.
            more: whether more of the source is to follow.

        Raises:
            InputError: an id lies outside the base model's vocabulary; nothing is appended.
            MemoryStoreError: a commit failed; all commits before it stand.
        """
        self._check_vocabulary(tokens)
        for chunk, follows in with_more(tokens.split(self.chunk_tokens)):
            self._commit(chunk, [SourcePart(source_id, len(chunk), follows or more)])
            if progress is not None:
                progress(len(chunk))

    def append_parts(self, tokens: Tensor, parts: Sequence[SourcePart]) -> None:
        """Appends token ids ``[n]`` of several sources in one commit.

        Args:
            tokens: int64 or int32, at least one.
            parts: where they come from.

        Raises:
            InputError: an id lies outside the base model's vocabulary; nothing is appended.
            InvariantError: the parts do not match the tokens; nothing is appended.
            MemoryStoreError: the commit failed; nothing is appended.
        """
        self._check_vocabulary(tokens)
        self._commit(tokens, parts)

    def _check_vocabulary(self, tokens: Tensor) -> None:
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < self.base.vocab_size:
            raise InputError(
                f"{self.base.name}: token ids must lie in 0…{self.base.vocab_size - 1}; was the "
                "text tokenized for another model?"
            )

    def _commit(self, tokens: Tensor, parts: Sequence[SourcePart]) -> None:
        if not len(tokens):
            return
        started = time.perf_counter()
        built = self.builder.build(self.memory, tokens)
        gist_ms = (time.perf_counter() - started) * 1000
        start = self.memory.n_tokens
        self.memory.append(
            tokens,
            built.gists,
            built.keys,
            fidelity=built.fidelity,
            block_texts=built.block_texts,
            parts=parts,
        )
        source_id = parts[0].source_id if len(parts) == 1 else None
        self._report(start, len(tokens), built, gist_ms, started, source_id)

    def _report(
        self,
        start: int,
        count: int,
        built: BuiltGists,
        gist_ms: float,
        started: float,
        source_id: int | None,
    ) -> None:
        if not self.telemetry.enabled:
            return
        generation = self.memory.generation
        ms = (time.perf_counter() - started) * 1000
        for level, vectors in built.gists.items():
            first = self.memory.count(level) - len(vectors)
            self.telemetry.gist(
                generation=generation, level=level, first=first, count=len(vectors), ms=gist_ms
            )
        self.telemetry.ingest(
            generation=generation, start=start, tokens=count, ms=ms, source_id=source_id
        )
        halves = (*built.keys.values(), *built.fidelity.values())
        gist_bytes = header_for(self.memory.identity, "gists", 1).record_bytes
        written = count * 4 + sum(values.numel() * 2 for values in halves)
        written += sum(len(vectors) for vectors in built.gists.values()) * gist_bytes
        self.telemetry.commit(
            generation=generation,
            tokens=self.memory.n_tokens,
            levels=self.memory.n_levels,
            bytes_written=written,
            ms=ms - gist_ms,
        )


def with_more(items: Iterable[ItemT]) -> Iterator[tuple[ItemT, bool]]:
    """Items, and whether another one follows.

    Where ``items`` fails, the last one is still given, as one that others should have followed.
    """
    held: list[ItemT] = []
    try:
        for item in items:
            if held:
                yield held.pop(), True
            held.append(item)
    except BaseException:
        if held:
            yield held.pop(), True
        raise
    if held:
        yield held.pop(), False
