"""Cuts documents into slices: a context of whole blocks and the tokens that follow it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from megacontext.config import FrozenConfig
from megacontext.runtime.text_pieces import text_pieces
from megacontext.training.texts import OnRead, TextFile, stream_documents

BLOCK_TOKENS = 32


class SliceConfig(FrozenConfig):
    """How documents are cut.

    Attributes:
        context_tokens: tokens of a context, whole blocks.
        horizon: tokens that follow the context.
        stride: tokens from one slice to the next; ``None``: ``context_tokens``.
        short_documents: what becomes of the end of a document that fills no whole context: ``pad``
            fills its last slice up with padding, ``skip`` leaves it out.
    """

    context_tokens: int = Field(
        default=4096, ge=BLOCK_TOKENS, le=1_048_576, multiple_of=BLOCK_TOKENS
    )
    horizon: int = Field(default=64, ge=32, le=128)
    stride: int | None = Field(default=None, ge=BLOCK_TOKENS, multiple_of=BLOCK_TOKENS)
    short_documents: Literal["pad", "skip"] = "pad"

    @property
    def step(self) -> int:
        """Tokens from one slice to the next."""
        return self.stride or self.context_tokens


@dataclass(frozen=True, eq=False)
class Window:
    """What one slice shows of a document.

    Attributes:
        offset: token of the document at which the context begins.
        context: ``[n]`` int64, ``n`` a multiple of the block and at most ``context_tokens``.
        future: ``[horizon]`` int64, the tokens that follow.
    """

    offset: int
    context: Tensor
    future: Tensor


@dataclass(frozen=True, order=True)
class Place:
    """Where a slice comes from; places are ordered as slices are.

    Attributes:
        source: number of the file in the corpus.
        document: number of the document in its file.
        offset: token of the document at which the context begins.
    """

    source: int
    document: int
    offset: int


@dataclass(frozen=True, eq=False)
class Cut:
    """What cutting a document came to: a window, or ``None`` where the document is too short."""

    place: Place
    window: Window | None


def cut_document(chunks: Iterable[Tensor], config: SliceConfig) -> Iterator[Window]:
    """Cuts one document, holding no more of it than a slice and a chunk.

    Args:
        chunks: the document's token ids, ``[m]`` int64 each.
        config: how to cut.

    Yields:
        Whole windows ``step`` tokens apart; then, if ``short_documents`` is ``pad``, one of the
        blocks left, where these reach further than the window before.
    """
    size, step = config.context_tokens, config.step
    held = torch.empty(0, dtype=torch.int64)
    offset, to_drop = 0, 0
    for chunk in chunks:
        held = torch.cat([held, chunk])
        while True:
            dropped = min(to_drop, len(held))
            held, to_drop = held[dropped:], to_drop - dropped
            if to_drop or len(held) < size + config.horizon:
                break
            yield Window(offset, held[:size], held[size : size + config.horizon])
            offset, to_drop = offset + step, step
    if config.short_documents == "skip" or to_drop:
        return
    left = (len(held) - config.horizon) // BLOCK_TOKENS * BLOCK_TOKENS
    known = size - step if offset else 0
    if left > max(known, 0):
        yield Window(offset, held[:left], held[left : left + config.horizon])


def cut_corpus(
    texts: Iterable[TextFile],
    encode: Callable[[str], Tensor],
    config: SliceConfig,
    *,
    after: Place | None = None,
    on_read: OnRead | None = None,
) -> Iterator[Cut]:
    """Cuts a corpus, file by file and document by document.

    Args:
        texts: the files.
        encode: text to token ids ``[n]`` int64.
        config: how to cut.
        after: leave out everything up to this place; nothing before its document is tokenized.
        on_read: called with the number of bytes of every read.

    Raises:
        DataError: a file cannot be read.
    """
    for source, text in enumerate(texts):
        if after is not None and source < after.source:
            if on_read is not None:
                on_read(text.path.stat().st_size)
            continue
        for number, parts in enumerate(stream_documents(text.path, on_read)):
            if after is not None and (source, number) < (after.source, after.document):
                continue
            empty = True
            for window in cut_document(map(encode, text_pieces(parts)), config):
                empty = False
                place = Place(source, number, window.offset)
                if after is None or place > after:
                    yield Cut(place, window)
            if empty:
                yield Cut(Place(source, number, 0), None)
