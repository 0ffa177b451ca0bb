"""Writers that are killed, and what is found afterwards.

It reads numbers of kills from standard input, one a line, and answers each with what came of it.
The model is loaded once; every writer is a fork, so that a thousand of them take minutes.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from megacontext.cli.output import hide_loading_bars
from megacontext.errors import InvariantError, MegaContextError
from megacontext.memory import Memory, MemoryIdentity, Source
from megacontext.runtime.engine import Engine
from megacontext.runtime.session import Session, SessionConfig
from tools._faults import Shim, preloaded_shim
from tools._memory_script import WORDS, describe

_MOST_TOKENS: Final = 3_000
_MOST_CALLS: Final = 400
_PROBE: Final = "amber birch"
_KILLS: Final = ("killed before", "killed within", "killed after")
Tell = Callable[[dict[str, Any]], None]


class ToldMemory(Memory):
    """Tells what it is about to commit, and what it has committed."""

    tell: Tell

    def append(self, tokens: Tensor, *args: Any, **options: Any) -> tuple[int, int]:
        """Appends as a memory does."""
        (part,) = options["parts"]
        source = self._pending.get(part.source_id or 0)
        told = {"source": source and source.uri, "number": part.source_id, "more": part.more}
        self.tell({"intent": tokens.tolist(), **told})
        span = super().append(tokens, *args, **options)
        self.tell({"done": self.n_tokens})
        return span


@dataclass
class Seen:
    """What a writer told before it died."""

    opened: bool = False
    error: str = ""
    commits: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    pending: dict[str, Any] | None = None

    def take(self, message: dict[str, Any]) -> None:
        """Takes one message."""
        if "intent" in message:
            self.pending = message
        elif "done" in message and self.pending is not None:
            self.commits.append(self.pending)
            self.pending = None
        self.opened |= "opened" in message
        self.error = message.get("error", self.error)


class Campaign:
    """A memory whose writers are killed, and its twin, which takes in the same undisturbed.

    Args:
        session: the models.
        folder: where both lie.
        seed: of everything that is drawn.
        shim: kills at a given call to the system; without it, only the clock does.
    """

    def __init__(self, session: Session, folder: Path, seed: int, shim: Shim | None) -> None:
        self.session = session
        self.seed = seed
        self.shim = shim
        self.folder = folder
        self.path = folder / "m.mctx"
        self.seconds_per_commit = 0.05
        self.identity = Engine.identity(session.base, session.gistnet, session.lens)
        self.twin = self._new_twin()

    def kill(self, number: int) -> str:
        """Starts a writer, kills it and looks at what it left behind."""
        rng = random.Random(f"{self.seed}/{number}")
        if self.twin.n_tokens > _MOST_TOKENS:
            self._start_over()
        site = rng.randrange(_MOST_CALLS) if self.shim is not None and number % 2 else None
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            self._write(writing, number, (site, rng.choice(_KILLS)))
        os.close(writing)
        seen = Seen()
        killed_by = self._watch(child, reading, seen, rng if site is None else None)
        if seen.error or killed_by != signal.SIGKILL:
            return f"broken: the writer ended by itself: {seen.error or killed_by}"
        try:
            return self._check(seen)
        except MegaContextError as error:
            return f"broken: {error}"

    def _watch(self, child: int, reading: int, seen: Seen, rng: random.Random | None) -> int:
        """Reads what the writer tells until it is dead; kills it unless it will do so itself."""
        commits = rng.randrange(8) if rng else -1
        deadline = time.monotonic() + 600
        started, rest = time.monotonic(), b""
        while True:
            if rng is not None and len(seen.commits) >= commits:
                delay = rng.uniform(0, 1.5 * self.seconds_per_commit)
                deadline, rng = min(deadline, time.monotonic() + delay), None
            left = deadline - time.monotonic()
            if left <= 0:
                os.kill(child, signal.SIGKILL)
                deadline += 600
            elif select.select([reading], [], [], left)[0]:
                part = os.read(reading, 1 << 16)
                if not part:
                    break
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    seen.take(json.loads(line))
        os.close(reading)
        if seen.commits:
            self.seconds_per_commit = (time.monotonic() - started) / len(seen.commits)
        _, status = os.waitpid(child, 0)
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)

    def _write(self, writing: int, number: int, fault: tuple[int | None, str]) -> None:
        """What a writer does until it is killed."""

        def tell(message: dict[str, Any]) -> None:
            os.write(writing, json.dumps(message).encode() + b"\n")

        try:
            if self.shim is not None and fault[0] is not None:
                self.shim.arm(self.folder, fault[0], fault[1])
            if not self.path.exists():
                ToldMemory.create(self.path, self.identity).close()
            memory = ToldMemory.open(self.path, "a", expect=self.identity)
            memory.tell = tell
            tell({"opened": True})
            engine = self.session.engine(memory)
            while True:
                rng = random.Random(f"{self.seed}/{number}/{memory.n_tokens}")
                words = " ".join(rng.choice(WORDS) for _ in range(rng.randrange(2, 120)))
                if rng.random() < 0.3:
                    for _ in engine.generate(words[:40], max_new_tokens=40, do_sample=False):
                        pass
                else:
                    engine.ingest(words, Source(uri=f"kill:{number}/{memory.n_tokens}"))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the parent wants to know
            tell({"error": repr(error)})
        finally:
            os._exit(1)

    def _check(self, seen: Seen) -> str:
        if not self.path.exists():
            _promise(not seen.opened and not self.twin.n_tokens, "the memory is gone")
            return "killed: before there was a memory"
        with Memory.open(self.path) as memory:
            told = self.twin.tokens().tolist() + _tokens(seen.commits)
            found = memory.tokens().tolist()
            kept = [] if seen.pending is None or found == told else [seen.pending]
            _promise(
                found == told + _tokens(kept),
                f"{len(told)} tokens were acknowledged, {len(found)} are there",
            )
            for problem in Memory.verify_path(self.path).problems:
                _promise(False, f"verify: {problem}")
            self._follow([*seen.commits, *kept])
            _promise(
                without_numbers(memory) == without_numbers(self.twin),
                "gists, keys, sources or index differ from a memory that was left alone",
            )
            _promise(
                not found or self._answer(memory) == self._answer(self.twin),
                "it goes on with other tokens than a memory that was left alone",
            )
        return f"killed: {'after' if kept else 'before'} a commit that was not acknowledged yet"

    def _follow(self, commits: list[dict[str, Any]]) -> None:
        """Lets the twin take in what the memory has."""
        ingestor = self.session.engine(self.twin).ingestor
        source_id, number = None, None
        for commit in commits:
            if commit["number"] is None:
                source_id = number = None
            elif commit["number"] != number:
                number = commit["number"]
                source_id = self.twin.begin_source(Source(uri=commit["source"]))
            ingestor.append(torch.tensor(commit["intent"]), source_id, more=commit["more"])

    def _answer(self, memory: Memory) -> list[int]:
        engine = self.session.engine(memory)
        options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "remember": False}
        return [token.id for token in engine.generate(_PROBE, **options)]

    def _start_over(self) -> None:
        self.twin.close()
        for path in (self.path, self.twin.path):
            shutil.rmtree(path)
        self.twin = self._new_twin()

    def _new_twin(self) -> Memory:
        return Memory.create(self.folder / "twin.mctx", self.identity)


def _promise(kept: bool, otherwise: str) -> None:
    if not kept:
        raise InvariantError(otherwise)


def _tokens(commits: list[dict[str, Any]]) -> list[int]:
    return [token for commit in commits for token in commit["intent"]]


def without_numbers(memory: Memory) -> dict[str, Any]:
    """All a memory says; numbers of sources that were never committed leave gaps."""
    said = describe(memory)
    identity: MemoryIdentity = said["identity"]
    return {**said, "identity": identity, "sources": [row[1:] for row in said["sources"]]}


def main() -> None:
    """Kills until the input ends."""
    torch.set_num_threads(1)
    hide_loading_bars()
    seed, config = json.loads(sys.argv[1])
    with (
        tempfile.TemporaryDirectory(prefix="megacontext-crash-") as folder,
        Session(SessionConfig.parse(config)) as session,
    ):
        campaign = Campaign(session, Path(folder), seed, preloaded_shim())
        print(json.dumps({"calls": campaign.shim is not None}), flush=True)
        for line in sys.stdin:
            result = campaign.kill(int(line))
            print(json.dumps({"outcome": result, "tokens": campaign.twin.n_tokens}), flush=True)


if __name__ == "__main__":
    main()
