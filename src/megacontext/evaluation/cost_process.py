"""Resident memory of a process that decodes from a memory and has done nothing else."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil

from megacontext.evaluation.cost_config import CostSuiteConfig
from megacontext.evaluation.cost_memories import approach
from megacontext.evaluation.ingest_suite import private_bytes
from megacontext.runtime.session import Session


def resident_bytes(config: CostSuiteConfig, path: Path) -> int:
    """Most bytes, page cache apart, that a fresh process holds while it decodes from a memory."""
    # Not forked: a copy of this process would begin with all that this one holds.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_decode_and_look, config, path).result()


def _decode_and_look(config: CostSuiteConfig, path: Path) -> int:
    process, most = psutil.Process(), 0
    with Session(config.session) as session:
        engine = session.open(path, writable=False)
        with engine.memory as memory:
            approach(engine, config.approach_blocks)
            size = memory.identity.block_size
            tokens = engine.generate(
                "The", max_new_tokens=config.decode_blocks * size + 1, remember=False
            )
            for number, _ in enumerate(tokens):
                if number % size == 0:
                    most = max(most, private_bytes(process))
    return max(most, private_bytes(process))
