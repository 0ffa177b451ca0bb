"""Text files as streams of documents, in constant memory; texts bundled with the package."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import zstandard

from megacontext.errors import DataError
from megacontext.training.lm_batches import END_OF_TEXT

BUNDLED_PREFIX = "bundled:"
_SUFFIX = ".txt.zst"
_CHUNK_BYTES = 65_536

OnRead = Callable[[int], None]


@dataclass(frozen=True)
class TextFile:
    """A text of a corpus.

    Attributes:
        name: what the corpus calls it; the same on every machine.
        path: where it lies here.
    """

    name: str
    path: Path

    def digest(self) -> str:
        """SHA-256 of the file as it lies on disk.

        Raises:
            DataError: the file cannot be read.
        """
        digest = hashlib.sha256()
        for chunk in _raw_chunks(self.path):
            digest.update(chunk)
        return digest.hexdigest()


def bundled_texts() -> list[str]:
    """Names of the texts shipped in the package, sorted."""
    folder = resources.files("megacontext") / "assets" / "books"
    if not folder.is_dir():
        return []
    return sorted(
        entry.name.removesuffix(_SUFFIX)
        for entry in folder.iterdir()
        if entry.name.endswith(_SUFFIX)
    )


def resolve_text(path: Path | str) -> Path:
    """The file of a text: ``bundled:NAME`` lies in the package, all else is a path already.

    Raises:
        DataError: there is no such bundled text.
    """
    name = str(path)
    if not name.startswith(BUNDLED_PREFIX):
        return Path(name).expanduser()
    bundled = name.removeprefix(BUNDLED_PREFIX)
    if bundled not in bundled_texts():
        known = ", ".join(BUNDLED_PREFIX + known for known in bundled_texts()) or "none"
        raise DataError(f"{name}: no such bundled text; bundled are: {known}")
    return Path(str(resources.files("megacontext") / "assets" / "books" / (bundled + _SUFFIX)))


def find_texts(names: Sequence[str]) -> list[TextFile]:
    """The files of a corpus, in the order given; patterns (``docs/*.md``) give sorted names.

    Raises:
        DataError: a file does not exist, a pattern matches none, or one file comes twice.
    """
    texts: list[TextFile] = []
    for name in names:
        if not name.startswith(BUNDLED_PREFIX) and any(mark in name for mark in "*?["):
            pattern = Path(name).expanduser()
            anchor = Path(pattern.anchor)
            matches = sorted(anchor.glob(str(pattern.relative_to(anchor))))
            texts += [TextFile(path.as_posix(), path) for path in matches if path.is_file()]
            if not matches:
                raise DataError(f"{name}: no file matches; name existing text files in `corpus`")
        else:
            texts.append(TextFile(name, resolve_text(name)))
    seen: set[Path] = set()
    for text in texts:
        if not text.path.is_file():
            raise DataError(f"{text.name}: no such file; name an existing text file in `corpus`")
        if text.path.resolve() in seen:
            raise DataError(f"{text.name}: listed twice in `corpus`; remove one of the two")
        seen.add(text.path.resolve())
    return texts


def stream_documents(path: Path, on_read: OnRead | None = None) -> Iterator[Iterator[str]]:
    """The documents of a text file (plain or ``.zst``), each a stream of its text.

    Joined, the parts are the documents that :func:`~.lm_batches.read_documents` gives: split at
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
    chunks = _raw_chunks(path, on_read)
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


def _raw_chunks(path: Path, on_read: OnRead | None = None) -> Iterator[bytes]:
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
