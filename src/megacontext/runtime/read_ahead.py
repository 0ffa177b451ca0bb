"""Reads and tokenizes documents in threads of their own, ahead of whoever takes them in."""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from megacontext.closing import Closing
from megacontext.runtime.ingest import with_more
from megacontext.runtime.text_pieces import text_pieces
from megacontext.runtime.tokenization import encode_text

# Bounds on what is held: documents begun, and pieces of about 64 thousand characters of each.
_DOCUMENTS_AHEAD = 64
_PIECES_AHEAD = 4

Opener = Callable[[], Iterable[str]]


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a document.

    Attributes:
        tokens: int32 ``[n]``; empty only where the whole document has none.
        size: bytes of the text that they stand for.
        more: whether more pieces follow.
    """

    tokens: Tensor
    size: int
    more: bool


def read_pieces(texts: Iterable[str], tokenizer: Any) -> Iterator[Piece]:
    """Tokenizes a stream of texts; there is at least one piece."""
    unread = 0  # bytes that make no token by themselves

    def encoded() -> Iterator[tuple[Tensor, int]]:
        nonlocal unread
        for text in text_pieces(texts):
            tokens = encode_text(tokenizer, text).to(torch.int32)
            unread += len(text.encode("utf-8", "surrogatepass"))
            if len(tokens):
                yield tokens, unread
                unread = 0

    empty = True
    for (tokens, size), more in with_more(encoded()):
        empty = False
        yield Piece(tokens, size, more)
    if empty:
        yield Piece(torch.empty(0, dtype=torch.int32), unread, more=False)


class ReadAhead(Closing):
    """The pieces of documents, in order; several documents are read at the same time.

    What is read and not yet taken is bounded, whatever the documents' number and length. Use it as
    a context manager: leaving it ends the threads.

    Args:
        documents: opens each document, as a stream of texts.
        tokenizer: copied for every reader, since a call may change a tokenizer's settings.
        readers: threads; each reads one document at a time.
    """

    def __init__(self, documents: Sequence[Opener], tokenizer: Any, *, readers: int) -> None:
        self._documents = iter(documents)
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(readers, "megacontext-reader")
        self._own = threading.local()
        self._changed = threading.Condition()
        self._begun: deque[tuple[deque[Piece], Future[None]]] = deque()
        self._stopped = False

    def __enter__(self) -> Self:
        self._begin()
        return self

    def close(self) -> None:
        """Ends the threads."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._pool.shutdown(cancel_futures=True)

    def next_document(self) -> Iterator[Piece]:
        """Pieces of the next document.

        Raises:
            MegaContextError: whatever reading it raised, behind the pieces before that.
        """
        held, reading = self._begun.popleft()
        self._begin()
        while (piece := self._next(held, reading)) is not None:
            yield piece
        reading.result()

    def _begin(self) -> None:
        """Lets the next documents be read, as many as may be ahead."""
        while len(self._begun) < _DOCUMENTS_AHEAD:
            document = next(self._documents, None)
            if document is None:
                return
            held: deque[Piece] = deque()
            reading = self._pool.submit(self._read, document, held)
            reading.add_done_callback(lambda _: self._notify())
            self._begun.append((held, reading))

    def _read(self, document: Opener, held: deque[Piece]) -> None:
        """Fills ``held`` with a document's pieces, in a thread of the pool."""
        if not hasattr(self._own, "tokenizer"):
            self._own.tokenizer = copy.deepcopy(self._tokenizer)
        for piece in read_pieces(document(), self._own.tokenizer):
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(held) < _PIECES_AHEAD)
                if self._stopped:
                    return
                held.append(piece)
                self._changed.notify_all()

    def _next(self, held: deque[Piece], reading: Future[None]) -> Piece | None:
        with self._changed:
            self._changed.wait_for(lambda: held or reading.done())
            piece = held.popleft() if held else None
            self._changed.notify_all()
        return piece

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
