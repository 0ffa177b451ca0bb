"""Lets every call that writes go wrong once: ``python -m tools.fault_campaign --set …``."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.errors import InputError
from megacontext.runtime.companions import MEAN
from megacontext.runtime.engine import EngineConfig
from megacontext.runtime.session import SessionConfig
from tools._campaign import BROKEN, CaseLog
from tools._entry import tool_main
from tools._faults import FAULTS, answer, compiler, start


class FaultCampaignConfig(FrozenConfig):
    """Which cases are tried.

    Attributes:
        output: folder of the log, from which an interrupted campaign goes on; none keeps none.
        cases: so many, drawn by ``seed``; all of them if 0.
        seed: of the draw.
        model: base model of the session that takes in and decodes; gists are the means of their
            spans.
        engine: budget and habits of that session.
    """

    output: Path | None = None
    cases: int = Field(default=0, ge=0)
    seed: int = 0
    model: str = "bundled:tiny"
    engine: EngineConfig = EngineConfig(budget=256, tail_tokens=64, chunk_tokens=48)


def run(config: FaultCampaignConfig) -> dict[str, Any]:
    """Tries every fault at every call of every step of a memory's life.

    Raises:
        InputError: there is no C compiler, or this is not Linux.
        InvariantError: something was lost, half done, or ended with a traceback.
    """
    if compiler() is None:
        raise InputError("the fault campaign needs Linux and a C compiler, cc; install one")
    session = SessionConfig(model=config.model, gistnet=MEAN, engine=config.engine)
    arguments = [json.dumps(session.model_dump(mode="json"))]
    with CaseLog(config.output) as log, tempfile.TemporaryDirectory() as folder:
        runners = [
            start("tools._fault_runner", [], Path(folder)),
            start("tools._session_fault_runner", arguments, Path(folder)),
        ]
        try:
            sites: dict[str, int] = {}
            runner_of: dict[str, subprocess.Popen[str]] = {}
            for runner in runners:
                told: dict[str, int] = json.loads(answer(runner))
                sites |= told
                runner_of |= dict.fromkeys(told, runner)
            for case in _cases(config, sites):
                name = f"{case['step']}, call {case['site']}: {case['fault']}"
                if name not in log:
                    runner = runner_of[case["step"]]
                    print(json.dumps(case), file=runner.stdin, flush=True)
                    log.add(name, json.loads(answer(runner))["outcome"])
                    if log.outcomes[name].startswith(BROKEN):
                        print(f"{name}: {log.outcomes[name]}", flush=True)
        finally:
            for runner in runners:
                runner.kill()
                runner.communicate()
        return {"sites": sites, **log.summary()}


def _cases(config: FaultCampaignConfig, sites: dict[str, int]) -> list[dict[str, Any]]:
    cases = [
        {"step": step, "fault": fault, "site": site}
        for step, count in sites.items()
        for fault in FAULTS
        for site in range(count)
    ]
    if not config.cases:
        return cases
    drawn = random.Random(config.seed).sample(range(len(cases)), config.cases)
    return [cases[number] for number in sorted(drawn)]


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
