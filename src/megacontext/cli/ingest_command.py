"""``megacontext ingest`` and ``megacontext regist``: commands that write to a memory."""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megacontext.cli.output import console, read_config, token_progress, write_json
from megacontext.errors import InputError
from megacontext.memory import KeyIndex, Memory, Source
from megacontext.memory.opening import is_taken
from megacontext.runtime.engine import Engine
from megacontext.runtime.regist import regist
from megacontext.runtime.session import Session, SessionConfig

_READ_BYTES = 1 << 20
_STDIN = "-"
_MEDIA_TYPES = {".md": "text/markdown", ".py": "text/x-python", ".html": "text/html"}


def run_ingest(arguments: argparse.Namespace) -> int:
    """Appends files; makes the memory where there is none."""
    config = read_config(SessionConfig, arguments)
    # A file that is no text must leave no trace: look at all of them before the first commit.
    sources = [_source(name, arguments) for name in arguments.files]
    with Session(config) as session:
        exists = is_taken(arguments.memory)
        engine = (
            session.open(arguments.memory, writable=True)
            if exists
            else session.create(arguments.memory)
        )
        with engine.memory, token_progress() as progress:
            taken = [
                _ingest(engine, name, source, progress)
                for name, source in zip(arguments.files, sources, strict=True)
            ]
            KeyIndex(engine.memory, config.key_index).update()
            stats = engine.memory.stats()
    console.print(
        f"{sum(item['tokens'] for item in taken):,} tokens taken in; "
        f"{arguments.memory} now holds {stats['tokens']:,}"
    )
    write_json(arguments.json, {"ingested": taken, "stats": stats})
    return 0


def run_regist(arguments: argparse.Namespace) -> int:
    """Rebuilds all gists for the configured GistNet and lens."""
    with (
        Session(read_config(SessionConfig, arguments)) as session,
        Memory.open(arguments.memory, "a") as memory,
        token_progress() as progress,
    ):
        tasks: dict[int, Any] = {}

        def advance(level: int, count: int) -> None:
            if level not in tasks:
                tasks[level] = progress.add_task(f"L{level}", total=memory.n_tokens)
            progress.advance(tasks[level], count * memory.identity.block_size**level)

        regist(session.base, memory, session.gistnet, session.lens, advance)
        KeyIndex(memory, session.config.key_index).update()
        version = memory.identity.gist_version
    console.print(f"{arguments.memory}: gists rebuilt, version {version}")
    write_json(arguments.json, {"gist_version": version})
    return 0


def _source(name: str, arguments: argparse.Namespace) -> Source:
    """What is recorded about a file; refuses one that cannot be read as UTF-8 text."""
    tags = tuple(arguments.tag)
    if name == _STDIN:
        return Source(uri="stdin:", author=arguments.author, tags=tags)
    path = Path(name)
    digest = hashlib.sha256()
    for chunk in _decoded(_file_chunks(path), name):
        digest.update(chunk.encode())
    return Source(
        uri=path.resolve().as_uri(),
        media_type=_MEDIA_TYPES.get(path.suffix, "text/plain"),
        sha256=digest.hexdigest(),
        author=arguments.author,
        created=path.stat().st_mtime,
        tags=tags,
    )


def _ingest(engine: Engine, name: str, source: Source, progress: Any) -> dict[str, Any]:
    task = progress.add_task(Path(name).name, total=None)
    if name == _STDIN:
        stream: BinaryIO = sys.stdin.buffer
        chunks = _decoded(iter(lambda: stream.read(_READ_BYTES), b""), "standard input")
    else:
        chunks = _decoded(_file_chunks(Path(name)), name)
    # Not Engine.ingest: nothing is going to be read here, so no budget can be too small.
    taken = engine.ingestor.ingest(chunks, source, lambda count: progress.advance(task, count))
    return {"source": source.uri, "start": taken.start, "tokens": taken.end - taken.start}


def _file_chunks(path: Path) -> Iterator[bytes]:
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file; name text files, or - for standard input")
        with path.open("rb") as file:
            while chunk := file.read(_READ_BYTES):
                yield chunk
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def _decoded(chunks: Iterable[bytes], name: str) -> Iterator[str]:
    """Text of UTF-8 chunks, which may end within a character."""
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


def _not_text(name: str, offset: int) -> InputError:
    return InputError(f"{name}: not UTF-8 text (byte {offset}); convert it, for example with iconv")
