"""Documents of text files, and which of them no training sees."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import zstandard

from megacontext.errors import DataError
from megacontext.tasks.recall_documents import Prose
from megacontext.tasks.text_streams import END_OF_TEXT, stream_documents

__all__ = [
    "END_OF_TEXT",
    "HELD_OUT_EVERY",
    "held_out_documents",
    "read_documents",
    "split_corpus",
]

HELD_OUT_EVERY = 16


def read_documents(paths: Sequence[Path]) -> list[str]:
    """Documents of text files (plain or ``.zst``), split at ``<|endoftext|>``.

    Raises:
        DataError: a file is missing, cannot be read or is not UTF-8 text.
    """
    documents: list[str] = []
    for path in paths:
        try:
            raw = path.read_bytes()
            if path.suffix == ".zst":
                raw = _decompressed(raw)
            text = raw.decode("utf-8")
        except FileNotFoundError:
            raise DataError(
                f"{path}: no such file; name an existing text file in `corpus`"
            ) from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        except (zstandard.ZstdError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: not (compressed) UTF-8 text: {error}") from None
        documents += [part.strip() for part in text.split(END_OF_TEXT) if part.strip()]
    return documents


def split_corpus(paths: Sequence[Path], held_out_every: int) -> tuple[Prose, Prose]:
    """The documents of text files: those to train on, and every n-th, which is held out.

    Raises:
        DataError: a file cannot be read, or there are fewer than ``held_out_every`` documents.
    """
    documents = read_documents(paths)
    _check_count(len(documents), held_out_every)
    training = [text for number, text in enumerate(documents) if number % held_out_every]
    return Prose(training), Prose(documents[::held_out_every])


def held_out_documents(paths: Sequence[Path], held_out_every: int = HELD_OUT_EVERY) -> list[str]:
    """The documents that :func:`split_corpus` holds out, with no more memory than they need.

    Which they are depends on the files and their order: name them as the training did.

    Raises:
        DataError: a file cannot be read, or there are fewer than ``held_out_every`` documents.
    """
    held_out: list[str] = []
    count = 0
    for path in paths:
        for parts in stream_documents(path):
            if count % held_out_every == 0:
                held_out.append("".join(parts))
            count += 1
    _check_count(count, held_out_every)
    return held_out


def _check_count(documents: int, held_out_every: int) -> None:
    if documents < held_out_every:
        raise DataError(
            f"the corpus has {documents} documents, too few to hold out one in "
            f"{held_out_every}; add text or lower `held_out_every`"
        )


def _decompressed(raw: bytes) -> bytes:
    """The content of all frames; a frame that ends early is an error, unlike in a stream reader."""
    parts: list[bytes] = []
    while raw:
        frame = zstandard.ZstdDecompressor().decompressobj()
        parts.append(frame.decompress(raw))
        if not frame.eof:
            raise zstandard.ZstdError("the compressed data ends early")
        raw = frame.unused_data
    return b"".join(parts)
