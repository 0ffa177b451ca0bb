"""Kills writers, looks at what they leave: ``python -m tools.crash_campaign --set kills=1000``."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.runtime.companions import MEAN
from megacontext.runtime.engine import EngineConfig
from megacontext.runtime.session import SessionConfig
from tools._campaign import BROKEN, CaseLog
from tools._entry import tool_main
from tools._faults import answer, start


class CrashCampaignConfig(FrozenConfig):
    """How often writers are killed.

    Attributes:
        output: folder of the log, from which an interrupted campaign goes on; none keeps none.
        kills: SIGKILLs; every second one at a call to the system where there is a C compiler, the
            others by the clock.
        seed: of what is written and when it ends.
        model: base model; gists are the means of their spans.
        engine: budget and habits of the writers.
    """

    output: Path | None = None
    kills: int = Field(default=100, ge=1)
    seed: int = 0
    model: str = "bundled:tiny"
    engine: EngineConfig = EngineConfig(budget=256, tail_tokens=64, chunk_tokens=48)


def run(config: CrashCampaignConfig) -> dict[str, Any]:
    """Kills writers that ingest and decode, one after the other, on one memory at a time.

    Returns:
        Outcomes of all kills; of those of this run ``most_tokens`` of a memory, and
        ``tokens_checked`` in all, since every kill is followed by a look at the whole memory.

    Raises:
        InvariantError: something acknowledged was lost, something half written was visible,
            ``verify`` complained, or the memory went on otherwise than one that was left alone.
    """
    session = SessionConfig(model=config.model, gistnet=MEAN, engine=config.engine)
    arguments = [json.dumps([config.seed, session.model_dump(mode="json")])]
    with CaseLog(config.output) as log, tempfile.TemporaryDirectory() as folder:
        runner = start("tools._crash_runner", arguments, Path(folder))
        try:
            started = json.loads(answer(runner))
            most = checked = 0
            for number in range(config.kills):
                if f"kill {number}" in log:
                    continue
                print(number, file=runner.stdin, flush=True)
                result = json.loads(answer(runner))
                log.add(f"kill {number}", result["outcome"])
                most = max(most, result["tokens"])
                checked += result["tokens"]
                if result["outcome"].startswith(BROKEN):
                    # The memory cannot be trusted from here on.
                    break
        finally:
            runner.kill()
            runner.communicate()
        return {**started, "most_tokens": most, "tokens_checked": checked, **log.summary()}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Kills writers at random points; nothing acknowledged may be lost or half written.",
        CrashCampaignConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
