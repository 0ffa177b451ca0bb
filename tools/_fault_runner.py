"""One step of a memory's life at a time, with one call to the system going wrong in it.

Started with the shim of ``_faults.c`` preloaded, it reads cases from standard input, a JSON object
per line, and answers each with what came of it.
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

from megacontext.errors import MegaContextError
from megacontext.memory import Memory
from tools._faults import Shim, preloaded_shim
from tools._memory_script import STEPS, Step, append, read

_NEVER: Final = -1
State = dict[str, Any] | None


@dataclass(frozen=True)
class Stage:
    """A step, ready to be taken again and again.

    Attributes:
        step: the step.
        template: the memory it is done to.
        before: what a reader is told before it; ``None`` where there is no memory yet.
        after: what a reader is told after it.
        sites: calls that change files on its way.
    """

    step: Step
    template: Path
    before: State
    after: State
    sites: int


def set_up(shim: Shim, step: Step, folder: Path) -> Stage:
    """Takes a step once with nothing going wrong."""
    template, path = folder / f"{step.name}.template", folder / "m.mctx"
    if step.template is not None:
        step.template(template)
    memory = step.prepare(path, template)
    with shim.armed(folder, _NEVER, "full disk") as calls:
        step.act(path, memory)
    if memory is not None:
        memory.close()
    after = read(path)
    shutil.rmtree(path)
    return Stage(step, template, read(template) if step.template else None, after, calls[0])


def outcome(shim: Shim, stage: Stage, fault: str, site: int) -> str:
    """Lets one call go wrong and checks that nothing is lost and nothing half done.

    Returns:
        ``survived``, ``refused`` or ``killed``; or ``broken: …`` with the promise that was.
    """
    with tempfile.TemporaryDirectory(prefix="megacontext-faults-") as name:
        path = Path(name) / "m.mctx"
        memory = stage.step.prepare(path, stage.template)
        try:
            take = _in_child if fault.startswith("killed") else _here
            result = take(shim, stage.step, path, memory, (site, fault))
            if result in ("survived", "refused", "killed"):
                return _check(stage, path, result) or result
            return f"broken: {result}"
        except MegaContextError as error:
            return f"broken: {error}"


def _here(shim: Shim, step: Step, path: Path, memory: Memory | None, fault: tuple[int, str]) -> str:
    result = "survived"
    try:
        with shim.armed(path.parent, *fault):
            try:
                step.act(path, memory)
            except MegaContextError as error:
                result = "refused" if "\n" not in str(error) else f"two lines: {error!r}"
            except Exception as error:  # noqa: BLE001 - any other is what is looked for
                result = f"not one of our errors: {error!r}"
            if memory is not None:
                memory.close()
    except MegaContextError as error:
        # Closing folds the log in, which may fail as well; it must say so and leave no lock.
        result = result if "\n" not in str(error) else f"two lines: {error!r}"
    return result


def _in_child(
    shim: Shim, step: Step, path: Path, memory: Memory | None, fault: tuple[int, str]
) -> str:
    if memory is not None:
        memory.close()  # a lock and a database must not be shared with a child
    child = os.fork()
    if not child:
        try:
            memory = Memory.open(path, "a") if memory is not None else None
            with shim.armed(path.parent, *fault):
                step.act(path, memory)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    return "killed" if killed else "survived"


def _check(stage: Stage, path: Path, result: str) -> str | None:
    """What is wrong with the memory now; ``None`` if nothing is."""
    if not path.exists():
        if stage.before is not None or result == "survived":
            return "broken: the memory is gone"
        stage.step.act(path, None)
    now = read(path)
    if now not in (stage.before, stage.after) or (result == "survived" and now != stage.after):
        return f"broken: {stage.step.name} is half done"
    report = Memory.verify_path(path)
    if not report.ok:
        return f"broken: {report.problems[0]}"
    with Memory.open(path, "a") as memory:
        append(memory, 33)
        if not memory.verify().ok or len(memory.tokens()) * 4 != len(now["tokens"]) + 132:
            return "broken: it cannot be written to afterwards"
    return None


def main() -> None:
    """Answers cases until the input ends."""
    shim = preloaded_shim()
    if shim is None:
        raise SystemExit("start it through tools.fault_campaign, which preloads the shim")
    with tempfile.TemporaryDirectory(prefix="megacontext-faults-") as folder:
        stages = {step.name: set_up(shim, step, Path(folder)) for step in STEPS}
        print(json.dumps({name: stage.sites for name, stage in stages.items()}), flush=True)
        for line in sys.stdin:
            case = json.loads(line)
            result = outcome(shim, stages[case["step"]], case["fault"], case["site"])
            print(json.dumps({**case, "outcome": result}), flush=True)


if __name__ == "__main__":
    main()
