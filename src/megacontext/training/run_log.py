"""Where a training run writes its numbers: JSON lines always, Weights & Biases if asked for."""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megacontext.errors import ConfigError

logger = logging.getLogger(__name__)


class RunLog(Protocol):
    """Takes the numbers of a run, step by step."""

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Adds a record; steps do not decrease, except right after :meth:`rewind`."""
        ...

    def rewind(self, step: int) -> None:
        """Forgets what was written after ``step``, which a resumed run will write again."""
        ...

    def close(self) -> None:
        """Ends the run."""
        ...


class JsonlLog:
    """One JSON object a line: ``step``, ``time`` and the record.

    Args:
        path: the file; it is appended to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Appends a line; NaN and infinity, which JSON lacks, become null."""
        line = json.dumps({"step": step, "time": round(time.time(), 1), **rounded(record)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        logger.info("%s", line)

    def rewind(self, step: int) -> None:
        """Drops the lines after ``step`` and one that an interruption cut off."""
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        part = self.path.with_suffix(".part")
        part.write_text("".join(kept), encoding="utf-8")
        part.replace(self.path)

    def close(self) -> None:
        """Nothing is kept open."""


class WandbLog:
    """`Weights & Biases <https://docs.wandb.ai>`_; offline where no API key is set.

    Args:
        folder: where its files go.
        name: name of the run. A resumed run goes on under the id kept in the folder.
        settings: the run's configuration.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError:
            raise ConfigError(
                "`wandb` is true, but the package is not installed; `pip install wandb` or set "
                "`wandb: false`"
            ) from None
        online = bool(os.environ.get("WANDB_API_KEY"))
        kept = folder / "wandb_run_id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(8), encoding="utf-8")
        self._run: Any = wandb.init(
            project="megacontext",
            id=kept.read_text(encoding="utf-8").strip(),
            resume="allow",
            name=name,
            dir=str(folder),
            config=dict(settings),
            mode="online" if online else "offline",
        )

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Logs the record under ``step``."""
        self._run.log(dict(record), step=step)

    def rewind(self, step: int) -> None:
        """Weights & Biases keeps what it has; a step written twice keeps its first values."""

    def close(self) -> None:
        """Finishes the run."""
        self._run.finish()


class RunLogs:
    """Several logs as one.

    Args:
        logs: each gets every record.
    """

    def __init__(self, *logs: RunLog) -> None:
        self.logs = logs

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Hands the record to every log."""
        for log in self.logs:
            log.write(step, record)

    def rewind(self, step: int) -> None:
        """Rewinds every log."""
        for log in self.logs:
            log.rewind(step)

    def close(self) -> None:
        """Closes every log."""
        for log in self.logs:
            log.close()


def rounded(value: Any) -> Any:
    """Numbers to four digits after the point, inside mappings too; what JSON lacks is ``None``."""
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return value


def training_progress() -> Progress:
    """The progress bar of a training run."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )
