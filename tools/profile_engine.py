"""A flame graph of decoding or ingest: ``python -m tools.profile_engine --set output=FILE.svg``."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.errors import ConfigError, InputError
from megacontext.evaluation.cost_memories import append_prose, approach
from megacontext.runtime.engine import Engine
from megacontext.runtime.session import Session, SessionConfig
from tools._entry import tool_main


class ProfileEngineConfig(FrozenConfig):
    """What is looked at, and for how long.

    Attributes:
        session: models and habits.
        what: ``decode``: a long answer behind a full window, a refocus after every block;
            ``ingest``: prose into a growing memory.
        history_tokens: tokens of history before it begins.
        approach_blocks: blocks at its end that the focus follows first.
        seconds: how long.
        rate: samples per second.
        output: the picture, an SVG file whose frames open at a click.
    """

    session: SessionConfig = SessionConfig()
    what: Literal["decode", "ingest"] = "decode"
    history_tokens: int = Field(default=50_000, ge=1)
    approach_blocks: int = Field(default=48, ge=0)
    seconds: int = Field(default=30, ge=1)
    rate: int = Field(default=200, ge=1, le=1_000)
    output: Path = Path("runs/profile.svg")


def run(config: ProfileEngineConfig) -> dict[str, Any]:
    """Works until the sampler has seen enough, and names the picture."""
    beside_python = str(Path(sys.executable).parent)
    sampler = shutil.which("py-spy", path=beside_python) or shutil.which("py-spy")
    if sampler is None:
        raise ConfigError("profiling needs py-spy; install the extra `profile`")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="megacontext-profile-") as folder,
        Session(config.session) as session,
    ):
        engine = session.create(Path(folder) / "profile.mctx")
        with engine.memory:
            append_prose(engine, config.history_tokens, 0)
            engine.focus.advance(engine.memory.n_tokens)
            approach(engine, config.approach_blocks)
            work = _decoding(engine) if config.what == "decode" else _ingesting(engine)
            next(work)  # what is done once only is no part of the picture
            _sample(sampler, config, work)
    return {"what": config.what, "picture": str(config.output)}


def _decoding(engine: Engine) -> Iterator[object]:
    """Greedy answers as long as a quarter of the window, each begun with other words."""
    for number in itertools.count():
        yield from engine.generate(
            f"Chapter {number}.",
            max_new_tokens=engine.config.budget // 4,
            remember=False,
            do_sample=False,
            eos_token_id=(),
        )


def _ingesting(engine: Engine) -> Iterator[object]:
    for number in itertools.count():
        append_prose(engine, engine.config.chunk_tokens, number)
        yield number


def _sample(sampler: str, config: ProfileEngineConfig, work: Iterator[object]) -> None:
    """Works while the sampler watches this process.

    Raises:
        InputError: the sampler failed; most often it may not look into other processes.
    """
    command = [
        sampler, "record", "--pid", str(os.getpid()), "--duration", str(config.seconds),
        "--rate", str(config.rate), "--output", str(config.output),
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as watching:  # noqa: S603
        while watching.poll() is None:
            next(work)
        told = watching.stdout.read().decode(errors="replace") if watching.stdout else ""
    if watching.returncode or not config.output.is_file():
        raise InputError(f"py-spy failed: {' '.join(told.split())[-200:]}")
    picture = config.output.read_text(encoding="utf-8")
    # The title is the command; where this machine keeps its files is nobody's concern.
    for path in (sampler, str(config.output)):
        picture = picture.replace(path, Path(path).name)
    config.output.write_text(picture, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Draws a flame graph of decoding with a memory, or of taking text into one.",
        ProfileEngineConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
