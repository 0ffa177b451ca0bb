"""Memories of given lengths for suite ``cost``, and an engine at the end of one."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import torch

from megacontext.evaluation.ingest_suite import IngestSuiteConfig, endless_prose
from megacontext.runtime.engine import Engine
from megacontext.runtime.ingest import Progress
from megacontext.runtime.session import Session
from megacontext.runtime.working_context import WorkingContext

Say = Callable[[str], None]


def make_memory(session: Session, folder: Path, n_tokens: int, seed: int, say: Say) -> Path:
    """A memory of exactly ``n_tokens`` of prose in ``folder``, made unless it lies there already.

    What is begun has another name until it is complete, so that an interrupted run leaves no half
    of one.

    Raises:
        MemoryStoreError: it cannot be written.
    """
    identity = Engine.identity(session.base, session.gistnet, session.lens)
    models = hashlib.sha256(repr(astuple(identity)).encode()).hexdigest()[:12]
    path = folder / f"{n_tokens}-{seed}-{models}.mctx"
    if path.is_dir():
        return path
    begun = path.with_suffix(".begun")
    shutil.rmtree(begun, ignore_errors=True)
    engine = session.create(begun)
    with engine.memory as memory:

        def report(_: int) -> None:
            say(f"ingesting {memory.n_tokens:,} of {n_tokens:,} tokens")

        append_prose(engine, n_tokens, seed, report)
    return begun.rename(path)


def append_prose(
    engine: Engine, n_tokens: int, seed: int, progress: Progress | None = None
) -> None:
    """Takes in exactly ``n_tokens`` of prose, in commits as large as ever; the focus stays behind.

    Raises:
        MemoryStoreError: a commit failed; all commits before it stand.
    """
    base, left = engine.base, n_tokens
    prose = endless_prose(IngestSuiteConfig(tokens=n_tokens, warm_tokens=1, seed=seed), base)
    for chunk in engine.ingestor.token_chunks(prose, engine.config.chunk_tokens):
        engine.ingestor.append(chunk[:left], progress=progress)
        left -= len(chunk)
        if left <= 0:
            return


def approach(engine: Engine, blocks: int) -> None:
    """Lets the focus follow the last blocks of a history as if they were being read.

    Before them, as many of the newest tokens as the budget allows are raw.

    Args:
        engine: stands at the end of its memory.
        blocks: a refocus each.
    """
    focus, context = engine.focus, engine.context
    size, end = context.block_size, engine.memory.n_tokens
    start = max(0, end - blocks * size)
    focus.context = WorkingContext.initial(
        max(0, start - context.budget),
        block_size=size,
        gist_cost=context.gist_cost,
        budget=context.budget,
        tail_tokens=context.tail_tokens,
    )
    focus.advance(start)
    nothing = torch.empty(0, dtype=torch.int64)
    for cursor in range(start + size, end + 1, size):
        focus.advance(cursor)
        focus.refocus(nothing, reserve=0, reason="stream")
    focus.advance(end)
