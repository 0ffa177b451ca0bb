"""The text files of a corpus, and texts bundled with the package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from megacontext.errors import DataError
from megacontext.tasks.text_streams import OnRead, raw_chunks, stream_documents

__all__ = [
    "BUNDLED_PREFIX",
    "OnRead",
    "TextFile",
    "bundled_texts",
    "find_texts",
    "resolve_text",
    "stream_documents",
]

BUNDLED_PREFIX = "bundled:"
_SUFFIX = ".txt.zst"


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
        for chunk in raw_chunks(self.path):
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
