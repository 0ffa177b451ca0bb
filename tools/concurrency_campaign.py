"""One writer and many readers: ``python -m tools.concurrency_campaign --set seconds=600``."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, Final

import torch
from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.errors import InvariantError, MegaContextError, MemoryLockedError
from megacontext.memory import Memory
from tools._entry import tool_main
from tools._memory_script import IDENTITY, append, batch

_FORK: Final = multiprocessing.get_context("fork")
_PAUSE: Final = 0.002
_VERIFY_EVERY: Final = 25
_REOPEN_EVERY: Final = 7


class ConcurrencyCampaignConfig(FrozenConfig):
    """How many read, and for how long.

    Attributes:
        seconds: how long it lasts.
        readers: processes that read while one writes.
        lifetime: most seconds until a writer is killed and another takes over.
        seed: of the writers' lifetimes.
    """

    seconds: float = Field(default=600, gt=0)
    readers: int = Field(default=8, ge=1)
    lifetime: float = Field(default=2.0, gt=0)
    seed: int = 0


def run(config: ConcurrencyCampaignConfig) -> dict[str, Any]:
    """Lets writers append, one after the other dying, while others read and want to write.

    Returns:
        ``commits``, ``tokens``, ``writers``; what the readers did: ``refreshes`` that showed
        something new, ``verified``, ``reopened``; how often a second writer was ``refused``.

    Raises:
        InvariantError: a reader saw something else than a committed prefix, ``verify`` complained,
            a second writer got in, or a lock outlived its process.
    """
    torch.set_num_threads(1)
    rng = random.Random(config.seed)
    end = time.monotonic() + config.seconds
    with tempfile.TemporaryDirectory(prefix="megacontext-concurrency-") as folder:
        path = Path(folder) / "m.mctx"
        Memory.create(path, IDENTITY).close()
        others = [_start(_read, path, end) for _ in range(config.readers)]
        writers = refused = 0
        while time.monotonic() < end or not writers:
            refused += _one_writer(path, rng.uniform(0.2, 1.0) * config.lifetime)
            writers += 1
        told = [_result(*other) for other in others]
        with Memory.open(path) as memory:
            _check(memory, 0)
            totals = {"commits": memory.generation, "tokens": memory.n_tokens}
    return {
        **totals,
        "writers": writers,
        "refused": refused,
        **{key: sum(result[key] for result in told) for key in told[0]},
    }


def size_of(generation: int) -> int:
    """Tokens of a commit; so every reader knows what each commit must be."""
    return 1 + generation * 7919 % 97


def _one_writer(path: Path, seconds: float) -> int:
    """Starts a writer, lets another try, and kills the first.

    Returns:
        How often the second one was refused.
    """
    told, tell = _FORK.Pipe(duplex=False)
    writer = _FORK.Process(target=_write, args=(path, tell), daemon=True)
    writer.start()
    tell.close()
    try:
        # A lock that outlived the writer before would let this one end at once.
        error = told.recv()
        _promise(error is None, f"a writer could not take over: {error}")
        end, refused = time.monotonic() + seconds, 0
        while not refused or time.monotonic() < end:
            try:
                Memory.open(path, "a").close()
            except MemoryLockedError as refusal:
                owner = f"process {writer.pid} on host {socket.gethostname()} "
                _promise(owner in str(refusal), f"the owner is not named: {refusal}")
                refused += 1
            else:
                raise InvariantError("a second writer got in")
            time.sleep(min(0.05, seconds))
    finally:
        if writer.pid is not None:
            os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    with contextlib.suppress(EOFError):
        raise InvariantError(f"a writer complained: {told.recv()}")
    return refused


def _write(path: Path, tell: Connection) -> None:
    try:
        with Memory.open(path, "a") as memory:
            tell.send(None)
            while True:
                append(memory, size_of(memory.generation))
    except MegaContextError as error:
        tell.send(str(error))


def _read(path: Path, end: float) -> dict[str, int]:
    """Follows the writers to the end; looks at every byte of every commit once."""
    done = {"refreshes": 0, "verified": 0, "reopened": 0}
    memory = Memory.open(path)
    seen = 0
    try:
        for turn in itertools.count():
            if memory.generation > seen:
                _check(memory, seen)
                seen = memory.generation
                done["refreshes"] += 1
                if done["refreshes"] % _VERIFY_EVERY == 0:
                    for problem in Memory.verify_path(path).problems:
                        raise InvariantError(f"verify: {problem}")
                    done["verified"] += 1
            if time.monotonic() > end:
                return done
            time.sleep(_PAUSE)
            if turn % _REOPEN_EVERY == 0:
                memory.close()
                memory = Memory.open(path)
                done["reopened"] += 1
            else:
                memory.refresh()
            _promise(memory.generation >= seen, "a commit that was seen is gone")
        return done
    finally:
        memory.close()


def _check(memory: Memory, seen: int) -> None:
    """The memory must hold what commits 1 to its own brought, and nothing else."""
    have = sum(size_of(commit) for commit in range(seen))
    for commit in range(seen, memory.generation):
        expected = batch(IDENTITY, have, size_of(commit))
        end = have + size_of(commit)
        right = torch.equal(memory.tokens(have, end), expected["tokens"].to(torch.int32))
        for level, gists in expected["gists"].items():
            first = have // IDENTITY.block_size**level
            found = memory.gists(level, first, first + len(gists))
            keys = memory.keys(level, first, first + len(gists))
            right &= torch.equal(found, gists.half())
            right &= torch.equal(keys, expected["keys"][level].half())
        _promise(right, f"commit {commit + 1} of {memory.generation} is not what was written")
        have = end
    _promise(memory.n_tokens == have, f"{memory.n_tokens} tokens are no committed prefix")


def _start(work: Callable[..., dict[str, int]], *arguments: Any) -> tuple[ForkProcess, Connection]:
    told, tell = _FORK.Pipe(duplex=False)

    def work_and_tell() -> None:
        try:
            tell.send(work(*arguments))
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent wants to know
            tell.send(repr(error))

    process = _FORK.Process(target=work_and_tell, daemon=True)
    process.start()
    tell.close()
    return process, told


def _result(process: ForkProcess, told: Connection) -> dict[str, int]:
    result = told.recv()
    process.join()
    _promise(isinstance(result, dict), f"a reader ended: {result}")
    return result


def _promise(kept: bool, otherwise: str) -> None:
    if not kept:
        raise InvariantError(otherwise)


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Readers look on while writers append and are killed; they see committed prefixes only.",
        ConcurrencyCampaignConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
