"""Lets every call that writes go wrong once: ``python -m tools.fault_campaign --set …``."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.errors import InputError
from tools._campaign import BROKEN, CaseLog
from tools._entry import tool_main
from tools._faults import FAULTS, answer, compiler, start


class FaultCampaignConfig(FrozenConfig):
    """Which cases are tried.

    Attributes:
        output: folder of the log, from which an interrupted campaign goes on; none keeps none.
        cases: so many, drawn by ``seed``; all of them if 0.
        seed: of the draw.
    """

    output: Path | None = None
    cases: int = Field(default=0, ge=0)
    seed: int = 0


def run(config: FaultCampaignConfig) -> dict[str, Any]:
    """Tries every fault at every call of every step of a memory's life.

    Raises:
        InputError: there is no C compiler, or this is not Linux.
        InvariantError: something was lost, half done, or ended with a traceback.
    """
    if compiler() is None:
        raise InputError("the fault campaign needs Linux and a C compiler, cc; install one")
    with CaseLog(config.output) as log, tempfile.TemporaryDirectory() as folder:
        runner = start("tools._fault_runner", [], Path(folder))
        try:
            sites: dict[str, int] = json.loads(answer(runner))
            cases = [
                {"step": step, "fault": fault, "site": site}
                for step, count in sites.items()
                for fault in FAULTS
                for site in range(count)
            ]
            if config.cases:
                drawn = random.Random(config.seed).sample(range(len(cases)), config.cases)
                cases = [cases[number] for number in sorted(drawn)]
            for case in cases:
                name = f"{case['step']}, call {case['site']}: {case['fault']}"
                if name not in log:
                    print(json.dumps(case), file=runner.stdin, flush=True)
                    log.add(name, json.loads(answer(runner))["outcome"])
                    if log.outcomes[name].startswith(BROKEN):
                        print(f"{name}: {log.outcomes[name]}", flush=True)
        finally:
            runner.kill()
            runner.communicate()
        return {"sites": sites, **log.summary()}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Lets every call that changes a memory's files fail, write too little, or be the last.",
        FaultCampaignConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
