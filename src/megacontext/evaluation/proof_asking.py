"""One rival over one history: made, asked, and watched."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import psutil

from megacontext.errors import InputError
from megacontext.evaluation.baselines import Informed, Rival, Span, rivals
from megacontext.evaluation.baselines.dense import DenseRetrieval
from megacontext.evaluation.baselines.engine_rival import EngineRival
from megacontext.evaluation.baselines.key_retrieval import KeyRetrieval
from megacontext.evaluation.long_questions import LongQuestion
from megacontext.evaluation.proof_setup import ProofSetup
from megacontext.memory import Memory


def make_rival(name: str, setup: ProofSetup, memory: Memory) -> tuple[Rival, float | None]:
    """A rival that is ready to answer.

    Returns:
        The rival, and the seconds in which it indexed the history, where it has an index of its
        own: other rivals find everything in the memory.

    Raises:
        ConfigError: its extra is not installed, or a size does not fit.
        ModelError: it cannot run on this architecture.
    """
    (rival,) = rivals([name], setup.base, memory, setup.gistnet, setup.lens, config=setup.habits)
    started = time.perf_counter()
    if isinstance(rival, DenseRetrieval):
        rival.embeddings()
    elif isinstance(rival, KeyRetrieval):
        rival.parts()
    else:
        return rival, None
    return rival, time.perf_counter() - started


def ask(rival: Rival, question: LongQuestion) -> dict[str, Any]:
    """What a rival answers and what there is to say of it, as fields of a record.

    Why not, where it cannot be asked.
    """
    if isinstance(rival, Informed):
        rival.inform(", ".join(question.answers), question.evidence)
    started = time.perf_counter()
    try:
        written = rival.answer(
            question.prompt, question.question, max_new_tokens=question.max_new_tokens
        )
    except InputError as error:
        return {"refused": str(error)}
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "written": written,
        "score": question.score(written),
        "evidence": raw_share(question.evidence, rival.raw_spans),
        "swap_rate": rival.engine.focus.meter.swap_rate if isinstance(rival, EngineRival) else None,
    }


def raw_share(needed: Iterable[Span], raw: Sequence[Span]) -> float | None:
    """The share of spans that lie wholly within one of ``raw``; ``None`` if there are none."""
    whole = [any(a <= start and end <= b for a, b in raw) for start, end in needed]
    return sum(whole) / len(whole) if whole else None


def peak_rss_bytes() -> int:
    """Most resident memory that this process ever had."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
