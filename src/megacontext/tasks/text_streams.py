"""Text files as streams of documents, in constant memory."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import zstandard

from megacontext.errors import DataError

END_OF_TEXT = "<|endoftext|>"
_CHUNK_BYTES = 65_536

OnRead = Callable[[int], None]


def stream_documents(path: Path, on_read: OnRead | None = None) -> Iterator[Iterator[str]]:
    """The documents of a text file (plain or ``.zst``), each a stream of its text.

    Joined, the parts are the documents that :func:`~.corpus.read_documents` gives: split at
    ``<|endoftext|>``, stripped, empty ones left out. A document must be read, or passed over,
    before the next is asked for.

    Args:
        path: the file.
        on_read: called with the number of bytes of every read.

    Raises:
        DataError: the file is missing, damaged, or is not UTF-8 text.
    """
    for _, parts in groupby(_numbered_parts(_characters(path, on_read)), key=itemgetter(0)):
        yield (part for _, part in parts)


def _numbered_parts(chunks: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Parts of documents with the document's number; white space around documents is dropped."""
    rest, number, begun = "", 0, False
    for chunk in chunks:
        *ended, rest = (rest + chunk).split(END_OF_TEXT)
        for text in ended:
            last = text.rstrip() if begun else text.strip()
            if last:
                yield number, last
            number += bool(last) or begun
            begun = False
        if not begun:
            rest = rest.lstrip()
        # The end may be the beginning of a mark, or white space that ends the document.
        ready = rest[: max(0, len(rest) - len(END_OF_TEXT) + 1)].rstrip()
        if ready:
            yield number, ready
            rest, begun = rest[len(ready) :], True
    last = rest.rstrip() if begun else rest.strip()
    if last:
        yield number, last


def _characters(path: Path, on_read: OnRead | None) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    chunks = raw_chunks(path, on_read)
    try:
        for content in _decompressed(chunks, path) if path.suffix == ".zst" else chunks:
            yield decoder.decode(content)
        yield decoder.decode(b"", final=True)
    except (zstandard.ZstdError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not (compressed) UTF-8 text: {error}") from None


def _decompressed(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    frames = zstandard.ZstdDecompressor()
    frame = None
    for chunk in chunks:
        content = chunk
        while content:
            frame = frame or frames.decompressobj()
            yield frame.decompress(content)
            content = frame.unused_data
            if frame.eof:
                frame = None
    if frame is not None:
        raise DataError(f"{path}: the compressed text ends too early; copy the file anew")


def raw_chunks(path: Path, on_read: OnRead | None = None) -> Iterator[bytes]:
    """The bytes of a file as it lies on disk, a piece at a time.

    Raises:
        DataError: the file is missing or cannot be read.
    """
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
                if on_read is not None:
                    on_read(len(chunk))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; name an existing text file in `corpus`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
