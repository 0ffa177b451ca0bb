"""Suite ``ingest``: a million tokens into a memory, in constant memory, and back in no time."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Self

import psutil
from pydantic import Field, model_validator

from megacontext.config import FrozenConfig
from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.evaluation.metrics import Estimate
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import EngineConfig
from megacontext.runtime.session import Session, SessionConfig


class IngestSuiteConfig(FrozenConfig):
    """How much the suite takes in.

    Attributes:
        model: base model.
        gistnet: GistNet checkpoint, ``bundled`` or ``mean``, which is the default.
        lens: LensNet checkpoint, or ``none``; the one bundled with the model, if it fits the gists.
        tokens: how many tokens, at least.
        warm_tokens: memory growth counts from here on.
        engine: budget and habits.
        seed: of the order of the text's paragraphs.
    """

    model: str = "bundled:tiny"
    gistnet: str | Path | None = None
    lens: str | Path | None = None
    tokens: int = Field(default=1_000_000, ge=1_000)
    warm_tokens: int = Field(default=100_000, ge=1)
    engine: EngineConfig = EngineConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _check_warm_tokens(self) -> Self:
        if self.warm_tokens > self.tokens:
            raise ValueError(
                f"warm_tokens is {self.warm_tokens}, more than the {self.tokens} tokens in all"
            )
        return self


def run_ingest_suite(
    config: IngestSuiteConfig, progress: Callable[[int], None] | None = None
) -> dict[str, Estimate]:
    """Tokens per second, growth of resident memory, reopening time, bytes per token.

    Args:
        config: the suite.
        progress: called with the tokens of every commit.
    """
    process = psutil.Process()
    models = SessionConfig(
        model=config.model, gistnet=config.gistnet, lens=config.lens, engine=config.engine
    )
    with (
        Session(models) as session,
        tempfile.TemporaryDirectory(prefix="megacontext-ingest-") as folder,
    ):
        path = Path(folder) / "ingest.mctx"
        taken = 0
        resident: list[int] = []

        def on_commit(count: int) -> None:
            nonlocal taken
            taken += count
            if taken >= config.warm_tokens:
                resident.append(private_bytes(process))
            if progress is not None:
                progress(count)

        engine = session.create(path)
        with engine.memory as memory:
            started = time.perf_counter()
            engine.ingest(endless_prose(config, session.base), progress=on_commit)
            seconds = time.perf_counter() - started
            tokens = memory.n_tokens
            per_token = memory.stats()["bytes_per_token"]
        started = time.perf_counter()
        with Memory.open(path, "a") as memory:
            reopened_ms = (time.perf_counter() - started) * 1000
    growth = (max(resident) - resident[0]) / 1e6
    return {
        "ingest.tokens_per_s": _single(tokens / seconds),
        "ingest.rss_growth_mb": _single(growth),
        "ingest.reopen_ms": _single(reopened_ms),
        "ingest.bytes_per_token": _single(per_token),
        "ingest.tokens": _single(float(tokens)),
    }


def private_bytes(process: psutil.Process) -> int:
    """Resident memory of a process without the pages of files, which the kernel can drop."""
    info = process.memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def endless_prose(config: IngestSuiteConfig, base: BaseModel) -> Iterator[str]:
    """Paragraphs of the bundled book in random order, until there are enough tokens."""
    rng = random.Random(f"ingest/{config.seed}")
    paragraphs = read_book(DemoConfig(model=config.model)).split("\n\n")
    count = 0
    while count < config.tokens:
        part = "\n\n".join(rng.sample(paragraphs, 200)) + "\n\n"
        count += len(base.encode(part))
        yield part


def _single(value: float) -> Estimate:
    return Estimate(value, value, value, 1)
