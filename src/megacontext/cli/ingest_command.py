"""``megacontext ingest`` and ``megacontext regist``: commands that write to a memory."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from megacontext.cli.output import byte_progress, console, read_config, token_progress, write_json
from megacontext.errors import InputError
from megacontext.memory import KeyIndex, Memory, Source
from megacontext.memory.opening import is_taken
from megacontext.runtime.bulk_ingest import Document, TakenIn, ingest_documents
from megacontext.runtime.regist import regist
from megacontext.runtime.session import Session, SessionConfig
from megacontext.runtime.text_files import PassedOver, check_files, decoded, find_files

_READ_BYTES = 1 << 20
_STDIN = "-"
_SHOWN = 10


def run_ingest(arguments: argparse.Namespace) -> int:
    """Appends files and folders; makes the memory where there is none."""
    config = read_config(SessionConfig, arguments)
    # A file that is no text must leave no trace: look at all of them before the first commit.
    documents, size, passed = _documents(arguments, config.ingest.readers)
    with Session(config) as session:
        exists = is_taken(arguments.memory)
        engine = (
            session.open(arguments.memory, writable=True)
            if exists
            else session.create(arguments.memory)
        )
        with engine.memory, byte_progress() as progress:
            # Not Engine.ingest: nothing is going to be read here, so no budget can be too small.
            taken = ingest_documents(
                engine.ingestor,
                documents,
                readers=config.ingest.readers,
                again=arguments.again,
                progress=_Counter(progress, size),
            )
            KeyIndex(engine.memory, config.key_index).update()
            stats = engine.memory.stats()
    _tell(taken, passed)
    console.print(
        f"{sum(item.tokens for item in taken):,} tokens taken in; "
        f"{arguments.memory} now holds {stats['tokens']:,}"
    )
    write_json(arguments.json, _result(taken, passed) | {"stats": stats})
    return 0


def run_regist(arguments: argparse.Namespace) -> int:
    """Rebuilds all gists for the configured GistNet and lens."""
    with (
        Session(read_config(SessionConfig, arguments)) as session,
        Memory.open(arguments.memory, "a", resident_mb=session.config.resident_mb) as memory,
        token_progress() as progress,
    ):
        tasks: dict[int, Any] = {}

        def advance(level: int, count: int) -> None:
            if level not in tasks:
                tasks[level] = progress.add_task(f"L{level}", total=memory.n_tokens)
            progress.advance(tasks[level], count * memory.identity.block_size**level)

        dtype = session.config.gist_dtype
        regist(session.base, memory, session.gistnet, session.lens, advance, gist_dtype=dtype)
        KeyIndex(memory, session.config.key_index).update()
        version = memory.identity.gist_version
    console.print(f"{arguments.memory}: gists rebuilt, version {version}")
    write_json(arguments.json, {"gist_version": version})
    return 0


def _documents(
    arguments: argparse.Namespace, readers: int
) -> tuple[list[Document], int | None, list[PassedOver]]:
    """What is to be taken in, its bytes where they are known, and what is passed over."""
    documents: list[Document] = []
    passed: list[PassedOver] = []
    tags, size = tuple(arguments.tag), 0
    for name in arguments.files:
        if name == _STDIN:
            source = Source(uri="stdin:", author=arguments.author, tags=tags)
            documents.append(Document(source, _standard_input, waits=True))
            continue
        found, rest = find_files([Path(name)], arguments.pattern)
        texts, odd = check_files(found, author=arguments.author, tags=tags, readers=readers)
        documents += [Document(text.source, text.read, text.size) for text in texts]
        passed += [*rest, *odd]
        size += sum(text.size for text in texts)
    if not documents:
        looked_for = ", ".join(arguments.pattern) or "UTF-8 text"
        raise InputError(f"{', '.join(arguments.files)}: no file of {looked_for} in there")
    return documents, None if _STDIN in arguments.files else size, passed


def _standard_input() -> Iterator[str]:
    stream = sys.stdin.buffer
    return decoded(iter(lambda: stream.read(_READ_BYTES), b""), "standard input")


class _Counter:
    """Moves a progress bar with every commit."""

    def __init__(self, progress: Progress, size: int | None) -> None:
        self.progress = progress
        self.task = progress.add_task("bytes", total=size, tokens=0, rate=0.0)
        self.started = time.monotonic()
        self.tokens = 0

    def __call__(self, tokens: int, size: int) -> None:
        self.tokens += tokens
        rate = self.tokens / max(time.monotonic() - self.started, 1e-3)
        self.progress.update(self.task, advance=size, tokens=self.tokens, rate=rate)


def _tell(taken: Sequence[TakenIn], passed: Sequence[PassedOver]) -> None:
    """What a user would otherwise have to guess."""
    skipped = sum(item.skipped for item in taken)
    if skipped:
        console.print(f"{skipped:,} unchanged and complete, skipped; --again takes them once more")
    for item in taken:
        if item.known:
            console.print(f"{item.source.uri}: goes on behind {item.known:,} tokens")
    if passed:
        reasons = Counter(item.reason.partition(" (")[0] for item in passed)
        listed = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        console.print(f"{len(passed):,} passed over: {listed}")
        for item in passed[:_SHOWN]:
            console.print(f"  {item.path}: {item.reason}")
        if len(passed) > _SHOWN:
            console.print("  …; --json lists all of them")


def _result(taken: Sequence[TakenIn], passed: Sequence[PassedOver]) -> dict[str, Any]:
    return {
        "ingested": [
            {"source": item.source.uri, "start": item.start, "tokens": item.tokens}
            for item in taken
            if not item.skipped
        ],
        "skipped": [item.source.uri for item in taken if item.skipped],
        "passed_over": [{"path": str(item.path), "reason": item.reason} for item in passed],
    }
