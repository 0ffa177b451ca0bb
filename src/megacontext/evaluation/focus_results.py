"""What the answers and measures of suite ``focus`` amount to, by published names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from megacontext.evaluation.focus_asking import Answered
from megacontext.evaluation.focus_questions import SEVERAL_LOOKS, FocusKind
from megacontext.evaluation.focus_streams import Streamed
from megacontext.evaluation.metrics import Estimate, mean, proportion, ratio

# Kinds that one look answers: what long histories are most often asked for.
_RECALL: tuple[FocusKind, ...] = ("same_words", "codes", "paraphrase", "corrected")
_OURS, _RIVAL, _BOUND = "lens", "lexical", "oracle"
_FEW = 400


class Cell(NamedTuple):
    """Questions of one kind, asked over histories of one length under one policy."""

    kind: FocusKind
    length: int
    policy: str


Cells = Mapping[Cell, Sequence[Answered]]
"""Answers by cell; those of one kind are to the same questions, in the same order."""
InWindow = Mapping[FocusKind, Sequence[Answered]]
"""Answers with nothing but the evidence and a little noise in the window."""


def length_name(tokens: int) -> str:
    """``4k``, ``1m``: the name of a length in tokens, of which ``1k`` is a thousand."""
    for size, unit in ((1_000_000, "m"), (1_000, "k")):
        if tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def answer_results(cells: Cells, in_window: InWindow) -> dict[str, Estimate]:
    """Accuracy, evidence, restlessness and time of every cell, and what is derived from them."""
    found: dict[str, Estimate] = {}
    for kind, answers in in_window.items():
        found[f"accuracy.{kind}.in_window"] = _share(answers, lambda one: one.right)
    for cell, answers in cells.items():
        found |= _of_cell(cell, answers, in_window.get(cell.kind, ()))
    found |= _retention(cells)
    found |= _against_rival(cells)
    found |= _ours(found, cells)
    return found


def stream_results(streams: Mapping[str, Streamed]) -> dict[str, Estimate]:
    """Of prose that streams by: NLL, regret against the oracle, and restlessness, by policy."""
    found: dict[str, Estimate] = {}
    bound = streams.get(_BOUND)
    for policy, streamed in streams.items():
        found[f"nll.prose.{policy}"] = mean(streamed.nll)
        if policy == _BOUND:
            continue
        found[f"swap_rate.prose_calm.{policy}"] = mean(streamed.swap_rates)
        found[f"chosen_swap_rate.prose_calm.{policy}"] = mean(streamed.chosen_rates)
        if bound is not None:
            regret = [nll - best for nll, best in zip(streamed.nll, bound.nll, strict=True)]
            found[f"regret.prose.{policy}"] = mean(regret)
    for name in ("regret.prose", "swap_rate.prose_calm", "chosen_swap_rate.prose_calm"):
        if f"{name}.{_OURS}" in found:
            found[name] = found[f"{name}.{_OURS}"]
    return found


def cost_results(
    costs: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> dict[str, Estimate]:
    """Time of a refocus over that of a decode step, by policy."""
    found = {f"refocus_cost_ratio.{policy}": ratio(*times) for policy, times in costs.items()}
    if _OURS in costs:
        found["refocus_cost_ratio"] = found[f"refocus_cost_ratio.{_OURS}"]
    return found


def _of_cell(
    cell: Cell, answers: Sequence[Answered], in_window: Sequence[Answered]
) -> dict[str, Estimate]:
    where = f"{cell.kind}.{length_name(cell.length)}.{cell.policy}"
    found = {f"accuracy.{where}": _share(answers, lambda one: one.right)}
    if cell.kind == "none":
        found[f"false_answers.{where}"] = _share(answers, lambda one: not one.abstained)
    else:
        at_start = [one.raw_at_start for one in answers]
        last = [one.raw_at_end for one in answers]
        found[f"evidence_at_start.{where}"] = mean(at_start)
        # What a note needed may make room for what the next one needs, so the last look counts.
        found[f"evidence_at_L0.{where}"] = mean(last if cell.kind in SEVERAL_LOOKS else at_start)
    if any(one.right for one in in_window):
        found[f"relative_accuracy.{where}"] = ratio(_hits(answers), _hits(in_window))
    found[f"swap_rate.{where}"] = mean([one.swap_rate for one in answers], resamples=_FEW)
    found[f"refocus_ms.{where}"] = mean([one.refocus_ms for one in answers], resamples=_FEW)
    return found


def _retention(cells: Cells) -> dict[str, Estimate]:
    """Accuracy where one look suffices, at the longest histories over that at the shortest."""
    lengths = sorted({cell.length for cell in cells})
    found: dict[str, Estimate] = {}
    if len(lengths) < 2:
        return found
    name = f"length_retention.{length_name(lengths[-1])}_over_{length_name(lengths[0])}"
    for policy in dict.fromkeys(cell.policy for cell in cells):
        kinds: list[FocusKind] = [
            kind for kind in _RECALL if Cell(kind, lengths[0], policy) in cells
        ]
        short, long = (
            [hit for kind in kinds for hit in _hits(cells[Cell(kind, length, policy)])]
            for length in (lengths[0], lengths[-1])
        )
        if any(short):
            found[f"{name}.{policy}"] = ratio(long, short)
    return found


def _against_rival(cells: Cells) -> dict[str, Estimate]:
    """What the lens answers beyond the lexical policy, in points, question by question."""
    found: dict[str, Estimate] = {}
    for cell, answers in cells.items():
        rival = cells.get(cell._replace(policy=_RIVAL))
        if cell.policy != _OURS or rival is None or cell.kind == "none":
            continue
        points = [
            100.0 * (ours.right - theirs.right) for ours, theirs in zip(answers, rival, strict=True)
        ]
        found[f"{_OURS}_minus_{_RIVAL}.{cell.kind}.{length_name(cell.length)}"] = mean(points)
    return found


def _ours(found: Mapping[str, Estimate], cells: Cells) -> dict[str, Estimate]:
    """The lens's own results under the names that bars are set for."""
    published = ("evidence_at_L0.", "relative_accuracy.", "length_retention.")
    ours = {
        name.removesuffix(f".{_OURS}"): estimate
        for name, estimate in found.items()
        if name.startswith(published) and name.endswith(f".{_OURS}")
    }
    unanswerable = [
        one
        for cell, answers in cells.items()
        if cell.policy == _OURS and cell.kind == "none"
        for one in answers
    ]
    if unanswerable:
        ours["false_answers.no_evidence"] = _share(unanswerable, lambda one: not one.abstained)
    return ours


def _hits(answers: Sequence[Answered]) -> list[float]:
    return [float(one.right) for one in answers]


def _share(answers: Sequence[Answered], holds: Callable[[Answered], bool]) -> Estimate:
    return proportion(sum(map(holds, answers)), len(answers))
