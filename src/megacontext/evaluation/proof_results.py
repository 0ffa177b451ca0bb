"""From the records of the suite ``proof`` to named estimates."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megacontext.evaluation.metrics import Estimate, mean, proportion, ratio
from megacontext.evaluation.proof_cells import COUNTING, Cell
from megacontext.evaluation.proof_config import MAIN, WINDOW, ProofSuiteConfig, tokens_of
from megacontext.evaluation.proof_records import Record

PUBLISHED_MEAN = ("qa1", "qa2", "qa3", "qa4", "qa5")
_LEAD_LENGTH = "128k"
# Not at equal budget, or told the answer, or MegaContext under another name.
_NO_COMPETITORS = ("full", "oracle", MAIN)
_POINTS = 100.0


@dataclass(frozen=True)
class Measured:
    """All records of a run.

    Attributes:
        config: what was asked.
        cells: for every cell and every rival that it asks, records in the order of the questions.
        prose: for every rival, records along the stream.
    """

    config: ProofSuiteConfig
    cells: Mapping[Cell, Mapping[str, Sequence[Record]]]
    prose: Mapping[str, Sequence[Record]]


def estimates(measured: Measured) -> dict[str, Estimate]:
    """Estimates by their published names; a rival's stands behind that of MegaContext.

    A rival that refused a question of a cell has no result there.
    """
    return dict(
        (
            *_accuracies(measured),
            *_depths(measured),
            *_leads(measured),
            *_prose(measured),
            *_evidence(measured),
            *_habits(measured),
            *_totals(measured),
        )
    )


def facts(measured: Measured) -> dict[str, Any]:
    """What the report tells besides: scores, the NLL along the stream, refusals, order of names."""
    config = measured.config
    refused: dict[str, dict[str, str]] = {}
    scores: dict[str, dict[str, list[float]]] = {}
    for cell, by_rival in measured.cells.items():
        for rival, records in by_rival.items():
            reason = _refusal(records)
            if reason:
                refused.setdefault(rival, {})[cell.name] = reason
            elif records:
                scores.setdefault(cell.name, {})[rival] = _scores(records)
    stream: dict[str, Any] = {}
    for rival, records in measured.prose.items():
        reason = _refusal(records)
        if reason:
            refused.setdefault(rival, {})[f"prose.{config.prose}"] = reason
        elif records:
            stream[rival] = {
                "positions": [record.position for record in records],
                "nll": [round(record.nll or 0.0, 5) for record in records],
            }
    every = [record for _, _, records in _asked(measured) for record in records]
    every += [record for records in measured.prose.values() for record in records]
    return {
        "rivals": list(config.names),
        "tasks": {
            "babilong": list(config.babilong),
            "ruler": list(config.ruler),
            "recall": list(config.recall),
        },
        "lengths": _lengths(measured),
        "prose_length": config.prose,
        "commits": sorted({record.commit for record in every}),
        "scores": scores,
        "prose": stream,
        "refused": refused,
    }


def _asked(measured: Measured) -> Iterator[tuple[Cell, str, Sequence[Record]]]:
    for cell, by_rival in measured.cells.items():
        for rival, records in by_rival.items():
            yield cell, rival, records


def _answered(measured: Measured) -> Iterator[tuple[Cell, str, Sequence[Record]]]:
    """Rivals that answered all they were asked, the heat map left out."""
    for cell, rival, records in _asked(measured):
        if records and cell.family != "niah_depth" and not _refusal(records):
            yield cell, rival, records


def _refusal(records: Sequence[Record]) -> str:
    return next((record.refused for record in records if record.refused), "")


def _scores(records: Sequence[Record]) -> list[float]:
    return [record.score for record in records if record.score is not None]


def _lengths(measured: Measured) -> list[str]:
    return sorted({cell.length for cell in measured.cells}, key=tokens_of)


def _named(name: str, rival: str) -> str:
    return name if rival == MAIN else f"{name}.{rival}"


def _accuracy(scores: Sequence[float]) -> Estimate:
    """A share of right answers; a mean where answers may be right in part."""
    if all(score in (0.0, 1.0) for score in scores):
        return proportion(int(sum(scores)), len(scores))
    return mean(scores)


def _accuracies(measured: Measured) -> Iterator[tuple[str, Estimate]]:
    pooled: dict[tuple[str, str], dict[str, list[float]]] = {}
    for cell, rival, records in _answered(measured):
        scores = _scores(records)
        yield _named(cell.name, rival), _accuracy(scores)
        if cell.family == "babilong" and cell.task in PUBLISHED_MEAN:
            pooled.setdefault((cell.length, rival), {})[cell.task] = scores
    for (length, rival), by_task in pooled.items():
        if len(by_task) == len(PUBLISHED_MEAN):
            scores = [score for task in PUBLISHED_MEAN for score in by_task[task]]
            yield _named(f"babilong.qa1-5.{length}", rival), _accuracy(scores)


def _depths(measured: Measured) -> Iterator[tuple[str, Estimate]]:
    for cell, rival, records in _asked(measured):
        if cell.family == "niah_depth" and records and not _refusal(records):
            yield _named(cell.name, rival), _accuracy(_scores(records))


def _leads(measured: Measured) -> Iterator[tuple[str, Estimate]]:
    """MegaContext minus each competitor, and minus the one that comes closest, in points."""
    by_length: dict[str, dict[str, dict[str, Sequence[Record]]]] = {}
    for cell, rival, records in _answered(measured):
        if cell.family == "recall":
            by_length.setdefault(cell.length, {}).setdefault(rival, {})[cell.task] = records
    tasks = set(measured.config.recall)
    complete = [
        length for length, by_rival in by_length.items() if set(by_rival.get(MAIN, {})) == tasks
    ]
    if not complete:
        return
    length = _LEAD_LENGTH if _LEAD_LENGTH in complete else max(complete, key=tokens_of)
    by_rival = by_length[length]
    leads = {
        rival: _lead(by_rival[MAIN], by_task, measured.config.seed)
        for rival, by_task in by_rival.items()
        if rival.split(".", maxsplit=1)[0] not in _NO_COMPETITORS and set(by_task) == tasks
    }
    if leads:
        yield f"lead.recall.{length}", min(leads.values(), key=lambda lead: lead.value)
    for rival, lead in leads.items():
        yield f"lead.recall.{length}.{rival}", lead


def _lead(
    ours: Mapping[str, Sequence[Record]],
    theirs: Mapping[str, Sequence[Record]],
    seed: int,
    resamples: int = 2000,
) -> Estimate:
    """Mean over tasks of the mean difference on the questions that both answered, in points.

    Percentile bootstrap within each task, paired; a history's questions are drawn together.
    """
    tasks: list[list[list[float]]] = []
    for task, records in theirs.items():
        right = {record.number: record.score or 0.0 for record in ours[task]}
        groups: dict[int, list[float]] = {}
        for record in records:
            if record.number in right:
                difference = right[record.number] - (record.score or 0.0)
                groups.setdefault(record.history, []).append(difference)
        tasks.append(list(groups.values()))
    rng = random.Random(f"lead/{seed}")
    means = sorted(
        math.fsum(_mean_of(rng.choices(groups, k=len(groups))) for groups in tasks) / len(tasks)
        for _ in range(resamples)
    )
    value = math.fsum(map(_mean_of, tasks)) / len(tasks)
    low, high = means[int(0.025 * resamples)], means[int(0.975 * resamples) - 1]
    count = sum(len(group) for groups in tasks for group in groups)
    return Estimate(_POINTS * value, _POINTS * low, _POINTS * high, count)


def _mean_of(groups: Sequence[Sequence[float]]) -> float:
    values = [value for group in groups for value in group]
    return math.fsum(values) / len(values)


def _prose(measured: Measured) -> Iterator[tuple[str, Estimate]]:
    length = measured.config.prose
    losses = {
        rival: [record.nll for record in records if record.nll is not None]
        for rival, records in measured.prose.items()
        if records and not _refusal(records)
    }
    for rival, values in losses.items():
        yield _named(f"prose_nll.{length}", rival), mean(values)
    if WINDOW not in losses:
        return
    for rival, values in losses.items():
        if rival != WINDOW:
            gain = [a - b for a, b in zip(losses[WINDOW], values, strict=True)]
            yield _named(f"prose_nll_gain.{length}", rival), mean(gain)


def _evidence(measured: Measured) -> Iterator[tuple[str, Estimate]]:
    for cell, rival, records in _answered(measured):
        shares = [record.evidence for record in records if record.evidence is not None]
        if shares and cell.task not in COUNTING:
            yield _named(f"evidence_at_L0.{cell.task}.{cell.length}", rival), mean(shares)


def _habits(measured: Measured) -> Iterator[tuple[str, Estimate]]:
    """Seconds and edits by length, over all tasks."""
    by_name: dict[str, list[float]] = {}
    for cell, rival, records in _answered(measured):
        for name, values in (
            ("seconds_per_answer", [record.seconds for record in records]),
            ("seconds_to_index", [record.index_s for record in records]),
            ("swap_rate", [record.swap_rate for record in records]),
        ):
            known = [value for value in values if value is not None]
            by_name.setdefault(_named(f"{name}.{cell.length}", rival), []).extend(known)
    for name in sorted(by_name, key=lambda name: name.split(".")[0]):
        if by_name[name]:
            yield name, mean(by_name[name])


def _totals(measured: Measured) -> Iterator[tuple[str, Estimate]]:
    every = [
        ((cell.name, record.history), record)
        for cell, _, records in _asked(measured)
        for record in records
    ]
    every += [(("prose", 0), record) for records in measured.prose.values() for record in records]
    if not every:
        return
    histories = dict(every)
    tokens = [float(record.tokens) for record in histories.values()]
    yield "ingest_tokens_per_s", ratio(tokens, [r.ingest_s for r in histories.values()])
    peak = max(record.peak_rss_mb for _, record in every)
    yield "peak_rss_mb", Estimate(peak, peak, peak, 1)
