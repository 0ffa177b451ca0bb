"""A session that takes in and decodes, with one call to the system going wrong in it.

Started with the shim of ``_faults.c`` preloaded, it reads cases from standard input, a JSON object
per line, and answers each with what came of it. Every session is a fork, so the model is loaded
once.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from megacontext.cli.output import hide_loading_bars
from megacontext.errors import InvariantError, MegaContextError
from megacontext.memory import Memory, Source
from megacontext.runtime.engine import Engine
from megacontext.runtime.session import Session, SessionConfig
from tools._crash_runner import Seen, Tell, ToldMemory, without_numbers
from tools._faults import Shim, preloaded_shim
from tools._memory_script import WORDS

_NEVER: Final = -1
_SECONDS: Final = 300
_BEFORE: Final = " ".join(WORDS * 6)
_FIRST: Final = " ".join(WORDS[1:] * 4)
_SECOND: Final = " ".join(WORDS[2:] * 2)
_NEXT: Final = "amber birch cobalt"
_GREEDY: Final[dict[str, Any]] = {"do_sample": False}


@dataclass(frozen=True)
class Moment:
    """A memory between two commits of a session that was left alone.

    Attributes:
        said: all that it says.
        later: what is said, and decoded, when another session goes on from it.
    """

    said: dict[str, Any]
    later: tuple[dict[str, Any], list[int]]


class SessionFaults:
    """A session, everything it must have committed, and the memory it begins with.

    Args:
        session: the models.
        folder: where its memories lie.
        shim: lets calls go wrong.
    """

    def __init__(self, session: Session, folder: Path, shim: Shim) -> None:
        self.session = session
        self.folder = folder
        self.shim = shim
        self.identity = Engine.identity(session.base, session.gistnet, session.lens)
        self.template = folder / "template.mctx"
        self.room = folder / "room"
        self.path = self.room / "m.mctx"
        with Memory.create(self.template, self.identity) as memory:
            session.engine(memory).ingest(_BEFORE, Source("before"))
        self.moments = self._moments()
        self.sites = self._count_sites()

    def outcome(self, site: int, fault: str) -> str:
        """Lets one call go wrong and looks at what is left.

        Returns:
            ``survived``, ``refused`` or ``killed``; or ``broken: …`` with the promise that was.
        """
        self._prepare()
        seen, status = self._in_child(site, fault)
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            result = "killed" if number == signal.SIGKILL else f"signal {number}"
        else:
            result = seen.error or "survived"
        if result not in ("survived", "refused", "killed"):
            return f"broken: {result}"
        try:
            self._check(len(seen.commits), result, in_flight=seen.pending is not None)
        except MegaContextError as error:
            return f"broken: {error}"
        return result

    def _prepare(self) -> None:
        shutil.rmtree(self.room, ignore_errors=True)
        self.room.mkdir()
        shutil.copytree(self.template, self.path)

    def _moments(self) -> list[Moment]:
        """The beginning, and what an undisturbed session leaves after each of its commits."""
        self._prepare()
        copies = [self.folder / "moment0"]
        shutil.copytree(self.path, copies[0])

        def keep(message: dict[str, Any]) -> None:
            if "done" in message:
                copies.append(self.folder / f"moment{len(copies)}")
                shutil.copytree(self.path, copies[-1])

        self._work(keep)
        moments: list[Moment] = []
        for copy in copies:
            with Memory.open(copy) as memory:
                said = without_numbers(memory)
            moments.append(Moment(said, self._go_on(copy)))
        return moments

    def _count_sites(self) -> int:
        self._prepare()
        with self.shim.armed(self.room, _NEVER, "full disk") as calls:
            self._work(lambda _: None)
        return calls[0]

    def _work(self, tell: Tell) -> None:
        memory = ToldMemory.open(self.path, "a", expect=self.identity)
        memory.tell = tell
        try:
            engine = self.session.engine(memory)
            engine.ingest(_FIRST, Source("first"))
            for _ in engine.generate("cobalt delta", max_new_tokens=24, **_GREEDY):
                pass
            engine.ingest(_SECOND, Source("second"))
        finally:
            memory.close()

    def _go_on(self, path: Path) -> tuple[dict[str, Any], list[int]]:
        """What the next session takes in, and the tokens it decodes."""
        with Memory.open(path, "a", expect=self.identity) as memory:
            engine = self.session.engine(memory)
            engine.ingest(_NEXT, Source("next"))
            tokens = engine.generate(_NEXT, max_new_tokens=8, **_GREEDY)
            decoded = [token.id for token in tokens]
            if not memory.verify().ok:
                raise InvariantError("it cannot be written to afterwards")
            return without_numbers(memory), decoded

    def _in_child(self, site: int, fault: str) -> tuple[Seen, int]:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.close(reading)
            self._run(writing, site, fault)
        os.close(writing)
        seen = Seen()
        with os.fdopen(reading) as pipe:
            for line in pipe:
                seen.take(json.loads(line))
        _, status = os.waitpid(child, 0)
        return seen, status

    def _run(self, writing: int, site: int, fault: str) -> None:
        def tell(message: dict[str, Any]) -> None:
            os.write(writing, json.dumps(message).encode() + b"\n")

        signal.alarm(_SECONDS)
        try:
            self.shim.arm(self.room, site, fault)
            self._work(tell)
        except MegaContextError as error:
            tell({"error": f"two lines: {error!r}" if "\n" in str(error) else "refused"})
        except BaseException as error:  # noqa: BLE001 - any other is what is looked for
            tell({"error": f"not one of our errors: {error!r}"})
        finally:
            os._exit(0)

    def _check(self, acknowledged: int, result: str, *, in_flight: bool) -> None:
        with Memory.open(self.path) as memory:
            said = without_numbers(memory)
        found = [number for number, moment in enumerate(self.moments) if moment.said == said]
        allowed = {acknowledged, acknowledged + in_flight}
        if not allowed.intersection(found):
            raise InvariantError(f"{acknowledged} commits were acknowledged, found is {found}")
        if result == "survived" and found != [len(self.moments) - 1]:
            raise InvariantError("it did not do all of it")
        for problem in Memory.verify_path(self.path).problems:
            raise InvariantError(f"verify: {problem}")
        if self._go_on(self.path) != self.moments[found[0]].later:
            raise InvariantError("it goes on otherwise than one that was left alone")


def main() -> None:
    """Answers cases until the input ends."""
    torch.set_num_threads(1)
    hide_loading_bars()
    shim = preloaded_shim()
    if shim is None:
        raise SystemExit("start it through tools.fault_campaign, which preloads the shim")
    with (
        tempfile.TemporaryDirectory(prefix="megacontext-session-faults-") as folder,
        Session(SessionConfig.parse(json.loads(sys.argv[1]))) as session,
    ):
        faults = SessionFaults(session, Path(folder), shim)
        print(json.dumps({"session": faults.sites}), flush=True)
        for line in sys.stdin:
            case = json.loads(line)
            result = faults.outcome(case["site"], case["fault"])
            print(json.dumps({**case, "outcome": result}), flush=True)


if __name__ == "__main__":
    main()
