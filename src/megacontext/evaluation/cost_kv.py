"""KV ``incremental`` beside ``exact``, for suite ``cost``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

from megacontext.errors import ConfigError
from megacontext.evaluation.cost_config import CostSuiteConfig
from megacontext.evaluation.kv_modes import (
    Compared,
    RefocusTime,
    compare_on_answers,
    compare_on_prose,
    question_times,
    refocus_times,
)
from megacontext.evaluation.metrics import Estimate, mean, median_of_ratios
from megacontext.evaluation.noise import NoiseTokens
from megacontext.evaluation.recall_questions import RecallConfig, recall_questions
from megacontext.memory import Memory
from megacontext.runtime.engine import Engine
from megacontext.runtime.session import Session

_QUERY_TOKENS = 12
_FACTS = 40
_ASKED = 5


def refocus_ratios(
    config: CostSuiteConfig,
    session: Session,
    path: Path,
    draw: Callable[[Memory, int, int], str],
) -> dict[str, Estimate]:
    """Refocuses in ``incremental`` over the same ones in ``exact``.

    Args:
        config: how many queries, and with how many edits a refocus counts.
        session: the models.
        path: a memory.
        draw: a text from its history, by number of tokens and of the query.

    Raises:
        ConfigError: no refocus made that many edits.
    """
    allocator = config.engine.allocator.model_copy(
        update={"max_edits": config.refocus_edits, "cooldown": 0}
    )
    with Memory.open(path) as memory:
        engine = Engine(
            session.base,
            memory,
            gistnet=session.gistnet,
            lens=session.lens,
            policy=session.policy(),
            config=config.engine.model_copy(update={"allocator": allocator}),
        )
        queries = [draw(memory, _QUERY_TOKENS, number) for number in range(config.refocuses + 1)]
        times = refocus_times(engine, queries)
        whole = question_times(engine, queries)
    results = refocus_results(times, config.refocus_edits)
    return {**results, "refocus_incremental_ratio.question": _whole_ratio(whole)}


def refocus_results(times: Sequence[RefocusTime], edits: int) -> dict[str, Estimate]:
    """The ratios by their published names.

    Scores and edits, which are the same in both modes, count in both. The first looks for a query,
    where it is searched for and read by itself as well, are also given apart.

    Args:
        times: of all refocuses.
        edits: those that made so many count.

    Raises:
        ConfigError: there is none.
    """
    chosen = [refocus for refocus in times if refocus.edits == edits]
    if not chosen:
        raise ConfigError(
            f"none of {len(times)} refocuses made {edits} edits; raise refocuses or lower "
            "refocus_edits"
        )
    results = {
        "refocus_incremental_ratio": _whole_ratio(chosen),
        "refocus_incremental_ratio.reading": median_of_ratios(
            [refocus.read["incremental"] for refocus in chosen],
            [refocus.read["exact"] for refocus in chosen],
        ),
    }
    if first := [refocus for refocus in chosen if not refocus.look]:
        results["refocus_incremental_ratio.first_look"] = _whole_ratio(first)
    return results


def _whole_ratio(chosen: Sequence[RefocusTime]) -> Estimate:
    return median_of_ratios(
        [refocus.whole("incremental") for refocus in chosen],
        [refocus.whole("exact") for refocus in chosen],
    )


def incremental_losses(config: CostSuiteConfig, session: Session) -> dict[str, Estimate]:
    """Nats per token that ``incremental`` loses, on prose and on answers, and answers lost."""
    base, gistnet = session.base, session.gistnet
    noise = NoiseTokens.read(base)
    prose = list(
        itertools.chain.from_iterable(
            compare_on_prose(
                base,
                gistnet,
                config.engine,
                noise,
                history=config.prose_history,
                blocks=config.prose_blocks,
                seed=f"cost/{config.seed}/{number}",
            )
            for number in range(config.prose_streams)
        )
    )
    asked = RecallConfig(task="planted", facts=_FACTS, asked=_ASKED)
    questions = recall_questions(
        noise, asked, count=config.recall_answers, length=config.recall_history, seed=config.seed
    )
    return loss_results(prose, compare_on_answers(base, gistnet, config.engine, questions))


def loss_results(prose: Sequence[Compared], answers: Sequence[Compared]) -> dict[str, Estimate]:
    """The losses by their published names; the one without a kind is the larger of the two."""
    by_kind = {
        "prose": mean([item.delta for item in prose]),
        "recall": mean([item.delta for item in answers]),
    }
    lost = [float(item.exact_right and not item.incremental_right) for item in answers]
    return {
        "incremental_delta_nll": max(by_kind.values(), key=lambda loss: loss.value),
        **{f"incremental_delta_nll.{kind}": loss for kind, loss in by_kind.items()},
        "incremental_answers_lost": mean(lost),
    }
