"""Forgets a source again and again, with one call to the system going wrong each time.

Started by ``tools._faults.start``, it reads cases from standard input, a JSON object per line, and
answers each with what came of it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from megacontext.errors import InputError, MegaContextError
from megacontext.gistnet import GistNet
from megacontext.memory import Memory, Source
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine
from megacontext.runtime.forget import Forgotten, forget
from tools._faults import Shim, preloaded_shim
from tools._memory_script import describe

GONE = "quagga zephyr obelisk. " * 20
PARTS = (
    ("first", "amber birch cobalt " * 60),
    ("gone", GONE),
    ("last", "delta ember fjord " * 60),
)


class Case:
    """A memory of three sources, the second of which is to go."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.base = BaseModel.from_pretrained(model)
        self.template = folder / "template.mctx"
        self.room = folder / "room"
        self.path = self.room / "m.mctx"
        with Memory.create(self.template, Engine.identity(self.base)) as memory:
            ingestor = Engine(self.base, memory).ingestor
            for uri, text in PARTS:
                ingestor.ingest(text, Source(uri))
        ids = self.base.encode(GONE).to(torch.int32)
        self.runs = {ids[i : i + 8].numpy().tobytes() for i in range(len(ids) - 7)}
        self.before = self.said(self.template)
        self.prepare()
        self.forget()
        self.after = self.said(self.path)

    def said(self, path: Path) -> dict[str, Any]:
        with Memory.open(path) as memory:
            assert memory.verify().ok
            return describe(memory)

    def prepare(self) -> None:
        shutil.rmtree(self.room, ignore_errors=True)
        self.room.mkdir()
        shutil.copytree(self.template, self.path)

    def forget(self) -> Forgotten:
        return forget(self.base, self.path, ["gone"], GistNet.untrained(self.base.d_model))

    def traced(self) -> bool:
        files = [file.read_bytes() for file in self.room.rglob("*") if file.is_file()]
        return any(run in raw for raw in files for run in self.runs)

    def wrong(self, result: str) -> str | None:
        """Which promise is broken now; ``None`` if none is."""
        if not self.path.exists():
            return "the memory is gone"
        now = self.said(self.path)
        if now not in (self.before, self.after) or (result == "survived" and now != self.after):
            return "forgetting is half done"
        finished = now == self.after and [file.name for file in self.room.iterdir()] == ["m.mctx"]
        if result == "survived" and not finished:
            return "something is left over"
        try:
            self.forget()
        except InputError:
            if not finished:
                return "a second call does not finish the first"
        if self.said(self.path) != self.after:
            return "a second call does something else"
        if [file.name for file in self.room.iterdir()] != ["m.mctx"]:
            return "a second call leaves something over"
        if self.traced():
            return "tokens of the source are still there"
        Memory.open(self.path, "a").close()
        return None


def take(shim: Shim, case: Case, site: int, fault: str) -> str:
    """Forgets, with one call going wrong, in a process of its own.

    Returns:
        ``survived``, ``refused``, ``killed`` or what went wrong.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        said = "survived"
        with shim.armed(case.room, site, fault):
            try:
                case.forget()
            except MegaContextError as error:
                said = "refused" if "\n" not in str(error) else f"two lines: {error!r}"
            except Exception as error:  # noqa: BLE001 - any other is what is looked for
                said = f"not one of our errors: {error!r}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    _, status = os.waitpid(child, 0)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    return "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else said


def main() -> None:
    """Answers cases until the input ends."""
    torch.set_num_threads(1)
    shim = preloaded_shim()
    assert shim is not None
    with tempfile.TemporaryDirectory(prefix="megacontext-forget-") as folder:
        case = Case(Path(sys.argv[1]), Path(folder))
        case.prepare()
        with shim.armed(case.room, -1, "full disk") as calls:
            case.forget()
        print(json.dumps({"sites": calls[0], "traced": case.traced()}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            case.prepare()
            result = take(shim, case, asked["site"], asked["fault"])
            known = result in ("survived", "refused", "killed")
            print(json.dumps({"result": result, "wrong": known and case.wrong(result)}), flush=True)


if __name__ == "__main__":
    main()
