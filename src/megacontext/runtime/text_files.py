"""Text files on disk: found in folders, checked before anything is taken in, read as a stream."""

from __future__ import annotations

import fnmatch
import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from megacontext.errors import InputError
from megacontext.memory import Source
from megacontext.memory.schema import CATALOG_NAME

_READ_BYTES = 1 << 20
# Text hardly ever holds a zero, other files nearly always do within their first bytes.
_SNIFFED_BYTES = 8192
_MEDIA_TYPES = {".md": "text/markdown", ".py": "text/x-python", ".html": "text/html"}


@dataclass(frozen=True)
class FoundFile:
    """A file to take in.

    Attributes:
        path: as it was named, or below the folder that was.
        named: whether it was named itself, and must therefore be text.
    """

    path: Path
    named: bool


@dataclass(frozen=True)
class PassedOver:
    """Something in a folder that is not taken in.

    Attributes:
        path: a file, or a folder with all that is in it.
        reason: why, in a few words.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class TextFile:
    """A file that was UTF-8 text when it was looked at.

    Attributes:
        path: where it lies.
        source: what is recorded about it; with its SHA-256.
        size: in bytes.
    """

    path: Path
    source: Source
    size: int

    def read(self) -> Iterator[str]:
        """Its text, in stretches.

        Raises:
            InputError: it cannot be read, or is no longer what it was. That is told before the
                end, so the last stretch of another text never comes.
        """
        digest = hashlib.sha256()
        last = ""
        for text in decoded(_file_chunks(self.path, digest.update), str(self.path)):
            if last:
                yield last
            last = text
        if digest.hexdigest() != self.source.sha256:
            raise InputError(
                f"{self.path}: changed while it was taken in; take it in again, it is another "
                "source now (`megacontext forget` removes what came of the old one)"
            )
        yield last


def find_files(
    paths: Iterable[Path], patterns: Sequence[str] = ()
) -> tuple[list[FoundFile], list[PassedOver]]:
    """Files that were named, and those in folders that were, in order of their paths.

    Hidden files and folders, memories, and what is no regular file are passed over in folders.
    Links to folders are not followed.

    Args:
        paths: files and folders; their order is kept.
        patterns: which names to look for in folders, as in ``*.md``; all if empty.

    Raises:
        InputError: a path does not exist, or a folder cannot be listed.
    """
    found: list[FoundFile] = []
    passed: list[PassedOver] = []
    for path in paths:
        if not _is_folder(path):
            found.append(FoundFile(path, named=True))
            continue
        try:
            items = list(_walk(path))
        except OSError as error:
            raise InputError(f"{path}: cannot be listed: {error.strerror}") from None
        passed += [item for item in items if isinstance(item, PassedOver)]
        files = [item for item in items if isinstance(item, Path)]
        found += [
            FoundFile(file, named=False)
            for file in files
            if not patterns or any(fnmatch.fnmatch(file.name, rule) for rule in patterns)
        ]
    return found, passed


def check_files(
    found: Sequence[FoundFile],
    *,
    author: str = "",
    tags: tuple[str, ...] = (),
    readers: int = 1,
) -> tuple[list[TextFile], list[PassedOver]]:
    """Reads every file once, so that one that is no text is known before anything is taken in.

    Args:
        found: files.
        author: recorded with every file.
        tags: recorded with every file.
        readers: how many are read at the same time.

    Returns:
        Text files in the order given, and files found in folders that are none.

    Raises:
        InputError: a file that was named cannot be read as UTF-8 text.
    """

    def look(file: FoundFile) -> TextFile | PassedOver:
        return _look(file, author, tags)

    with ThreadPoolExecutor(readers) as pool:
        looked = list(pool.map(look, found))
    texts = [item for item in looked if isinstance(item, TextFile)]
    return texts, [item for item in looked if isinstance(item, PassedOver)]


def decoded(chunks: Iterable[bytes], name: str) -> Iterator[str]:
    """Text of UTF-8 chunks, which may end within a character.

    Raises:
        InputError: they are no UTF-8; names the first byte that is wrong.
    """
    rest, done = b"", 0
    for chunk in chunks:
        raw = rest + chunk
        try:
            text = raw.decode("utf-8")
            rest = b""
        except UnicodeDecodeError as error:
            if len(raw) - error.start >= 4 or error.reason != "unexpected end of data":
                raise _not_text(name, done + error.start) from None
            text, rest = raw[: error.start].decode("utf-8"), raw[error.start :]
        done += len(raw) - len(rest)
        yield text
    if rest:
        raise _not_text(name, done)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False  # such as a name that is too long; opening it as a file tells


def _walk(folder: Path) -> Generator[Path | PassedOver]:
    """Regular files below a folder, sorted, and what is passed over.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = Path(entry.path)
        if entry.name.startswith("."):
            yield PassedOver(path, "hidden")
        elif entry.is_dir(follow_symlinks=False):
            if (path / CATALOG_NAME).exists():
                yield PassedOver(path, "a memory")
                continue
            try:
                yield from _walk(path)
            except OSError as error:
                yield PassedOver(path, f"cannot be listed: {error.strerror}")
        elif entry.is_file():
            yield path
        else:
            yield PassedOver(path, "a link to a folder" if entry.is_dir() else "no file")


def _look(file: FoundFile, author: str, tags: tuple[str, ...]) -> TextFile | PassedOver:
    path = file.path
    digest = hashlib.sha256()
    chunks = _file_chunks(path, digest.update)
    try:
        first = next(chunks, b"")
        if not file.named and b"\0" in first[:_SNIFFED_BYTES]:
            return PassedOver(path, "binary")
        for _ in decoded(chain([first], chunks), str(path)):
            pass
        size, created = path.stat().st_size, path.stat().st_mtime
    except InputError as error:
        if file.named:
            raise
        reason = str(error).removeprefix(f"{path}: ").partition(";")[0]
        return PassedOver(path, reason)
    except OSError as error:
        raise _unreadable(path, error) from None
    source = Source(
        uri=path.resolve().as_uri(),
        media_type=_MEDIA_TYPES.get(path.suffix, "text/plain"),
        sha256=digest.hexdigest(),
        author=author,
        created=created,
        tags=tags,
    )
    return TextFile(path, source, size)


def _file_chunks(path: Path, seen: Callable[[bytes], None] | None = None) -> Iterator[bytes]:
    try:
        if not path.is_file():
            raise InputError(
                f"{path}: no such file; name text files or folders, or - for standard input"
            )
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                if seen is not None:
                    seen(chunk)
                yield chunk
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot be read: {error.strerror}")


def _not_text(name: str, offset: int) -> InputError:
    return InputError(f"{name}: not UTF-8 text (byte {offset}); convert it, for example with iconv")
