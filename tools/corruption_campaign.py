"""Damages memories in every way: ``python -m tools.corruption_campaign --set …``."""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from megacontext.config import FrozenConfig
from tools._campaign import BROKEN, CaseLog
from tools._entry import tool_main
from tools._faults import answer, start

_BYTES_PER_CASE: Final = 64


class CorruptionCampaignConfig(FrozenConfig):
    """Which damage is done.

    Attributes:
        output: folder of the log, from which an interrupted campaign goes on; none keeps none.
        flips: so many bytes of each memory's files, drawn by ``seed``, each file having its share;
            all of them if 0.
        mask: what becomes of a byte.
        damages: so many other damages of each memory, drawn by ``seed``; all of them if 0.
        seed: of the draws.
    """

    output: Path | None = None
    flips: int = Field(default=0, ge=0)
    mask: Literal["one bit", "lowest bit", "highest bit", "all bits"] = "one bit"
    damages: int = Field(default=0, ge=0)
    seed: int = 0


def run(config: CorruptionCampaignConfig) -> dict[str, Any]:
    """Damages a memory that was closed and one whose writer was killed.

    Returns:
        ``detected``: changed bytes that ``verify`` complains about; ``harmless``: by part of a
        file, those it lets pass and that change nothing that is ever read; ``damages``: by
        outcome.

    Raises:
        InvariantError: damage went unnoticed, or ended with a traceback, a hang or a huge
            allocation.
    """
    rng = random.Random(config.seed)
    harmless: Counter[str] = Counter()
    others: Counter[str] = Counter()
    detected = 0
    with CaseLog(config.output) as log, tempfile.TemporaryDirectory() as folder:
        runner = start("tools._corruption_runner", [], Path(folder))
        try:
            for case in _cases(config, json.loads(answer(runner)), rng):
                name = json.dumps(case)
                if name not in log:
                    print(name, file=runner.stdin, flush=True)
                    log.add(name, answer(runner).strip())
                result = json.loads(log.outcomes[name])
                detected += result.get("detected", 0)
                harmless.update(result.get("harmless", {}))
                if "outcome" in result:
                    log.outcomes[name] = result["outcome"]
                    others[result["outcome"]] += 1
                    if result["outcome"].startswith(BROKEN):
                        print(f"{name}: {result['outcome']}", flush=True)
        finally:
            runner.kill()
            runner.communicate()
        log.summary()
    return {
        "detected": detected,
        "harmless": dict(sorted(harmless.items())),
        "damages": dict(sorted(others.items())),
    }


def _cases(
    config: CorruptionCampaignConfig, told: dict[str, Any], rng: random.Random
) -> Iterator[dict[str, Any]]:
    for state, found in told.items():
        names: list[str] = found["damages"]
        for name in rng.sample(names, config.damages) if config.damages else names:
            yield {"state": state, "damage": name}
        for name, size in found["files"].items():
            count = -(-config.flips // len(found["files"])) if config.flips else size
            places = sorted(rng.sample(range(size), min(count, size)))
            for first in range(0, len(places), _BYTES_PER_CASE):
                yield {
                    "state": state,
                    "file": name,
                    "places": places[first : first + _BYTES_PER_CASE],
                    "mask": config.mask,
                }


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Changes every byte of a memory's files, cuts and swaps them; all of it must be noticed.",
        CorruptionCampaignConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
