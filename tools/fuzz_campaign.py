"""Feeds mutated bytes to everything that reads files: ``python -m tools.fuzz_campaign``."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.errors import InputError
from tools._campaign import BROKEN, CaseLog
from tools._entry import tool_main

FuzzTarget = Literal[
    "ctx", "note", "config", "override", "checkpoint", "weights", "text", "rows",
    "recording", "memory",
]  # fmt: skip
FUZZ_TARGETS: tuple[FuzzTarget, ...] = (
    "ctx", "note", "config", "override", "checkpoint", "weights", "text", "rows",
    "recording", "memory",
)  # fmt: skip
# An input that takes longer than these seconds, or more than these MB, is a finding as well.
_SLOW, _LARGE = 20, 4096


class FuzzCampaignConfig(FrozenConfig):
    """What is fuzzed, and for how long.

    Attributes:
        output: folder of the log, from which an interrupted campaign goes on, and of the inputs
            that broke a promise; none keeps none.
        targets: readers of files and arguments.
        runs: inputs for each.
        seconds: how long each is fuzzed instead, if that is given.
        seed: of the mutations.
    """

    output: Path | None = None
    targets: tuple[FuzzTarget, ...] = Field(default=FUZZ_TARGETS, min_length=1)
    runs: int = Field(default=20_000, ge=1)
    seconds: int | None = Field(default=None, ge=1)
    seed: int = Field(default=1, ge=1)


def run(config: FuzzCampaignConfig) -> dict[str, Any]:
    """Runs libFuzzer on every target.

    Returns:
        ``inputs``: how many each target was given.

    Raises:
        InputError: atheris is not installed.
        InvariantError: some input ended otherwise than with a result or an error of one line.
    """
    if importlib.util.find_spec("atheris") is None:
        raise InputError('the fuzz campaign needs atheris; install it with "megacontext[fuzz]"')
    with CaseLog(config.output) as log, tempfile.TemporaryDirectory() as folder:
        found = Path(folder) if config.output is None else config.output.resolve()
        for target in config.targets:
            amount = f"{config.runs} inputs" if config.seconds is None else f"{config.seconds} s"
            name = f"{target}, {amount}, seed {config.seed}"
            if name not in log:
                log.add(name, _fuzzed(target, config, found))
                print(f"{name}: {log.outcomes[name]}", file=sys.stderr, flush=True)
        held = {name.partition(",")[0]: outcome for name, outcome in log.outcomes.items()}
        log.summary()
        return {"inputs": {name: int(outcome.split()[1]) for name, outcome in held.items()}}


def _fuzzed(target: str, config: FuzzCampaignConfig, found: Path) -> str:
    """What became of one target: ``held N inputs``, or what broke and with which input."""
    limit = (
        f"-runs={config.runs}" if config.seconds is None else f"-max_total_time={config.seconds}"
    )
    options = [
        limit, f"-seed={config.seed}", f"-timeout={_SLOW}",
        f"-rss_limit_mb={_LARGE}", f"-artifact_prefix={found}/{target}-",
    ]  # fmt: skip
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "tools._fuzz_runner", target, *options],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    counted = re.search(r"^Done (\d+) runs", done.stderr, re.MULTILINE)
    if done.returncode == 0 and counted:
        return f"held {counted[1]} inputs"
    lines = [line.strip() for line in done.stderr.splitlines()]
    said = [line for line in lines if "Error" in line or "ERROR" in line or "Test unit" in line]
    return f"{BROKEN}: {' | '.join(said[:3]) or (lines or ['nothing was said'])[-1]}"


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Throws mutated bytes at every reader of files and arguments, with atheris.",
        FuzzCampaignConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
