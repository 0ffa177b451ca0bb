"""What taking tokens into a memory costs beside the base reading them."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from megacontext.evaluation.cost_config import CostSuiteConfig
from megacontext.evaluation.cost_memories import append_prose
from megacontext.evaluation.metrics import Estimate, ratio_of_medians
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.session import Session


def ingest_ratio(config: CostSuiteConfig, session: Session, folder: Path) -> Estimate:
    """Tokens per second of ingest, tokenizing and disk included, over those of prefill.

    The base reads windows of the budget's length, as many at a time as is fastest; it neither
    tokenizes nor stores anything.
    """
    base, window = session.base, config.engine.budget
    draw = torch.Generator().manual_seed(config.seed)
    shape = (config.prefill_windows, window)
    ids = torch.randint(0, base.vocab_size, shape, generator=draw)
    # The faster of two, since whichever comes first warms up for the others.
    batch = min(
        config.prefill_batches,
        key=lambda size: min(_prefill_seconds(base, ids, size) for _ in range(2)),
    )
    ingesting: list[float] = []
    reading: list[float] = []
    engine = session.create(folder / "ingest.mctx")
    with engine.memory:
        for number in range(config.ingest_repeats + 1):
            started = time.perf_counter()
            append_prose(engine, config.ingest_tokens, config.seed + number)
            ingesting.append((time.perf_counter() - started) / config.ingest_tokens)
            reading.append(_prefill_seconds(base, ids, batch) / ids.numel())
    # The first of each warms up.
    return ratio_of_medians(reading[1:], ingesting[1:])


@torch.inference_mode()
def _prefill_seconds(base: BaseModel, ids: torch.Tensor, batch: int) -> float:
    """Seconds to read windows ``[w, n]``, ``batch`` at a time, their keys and values kept."""
    started = time.perf_counter()
    for windows in ids.split(batch):
        base.model(input_ids=windows.to(base.device), use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started
