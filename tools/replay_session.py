"""Repeats a recorded session and compares: ``python -m tools.replay_session --set recording=…``."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megacontext.runtime.replay import ReplayConfig, replay
from tools._entry import tool_main


def run(config: ReplayConfig) -> dict[str, Any]:
    """Repeats it in the given folder or in a temporary one."""
    if config.folder is not None:
        return asdict(replay(config.recording, config.folder))
    with tempfile.TemporaryDirectory(prefix="megacontext-replay-") as folder:
        return asdict(replay(config.recording, Path(folder)))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Repeats a recorded session on a new memory; the first difference is named.",
        ReplayConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
