"""The suite ``focus`` as a page: tables and a picture, made from its JSON line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megacontext.evaluation.figures import svg_pyplot
from megacontext.evaluation.focus_questions import FOCUS_KINDS
from megacontext.evaluation.markdown_table import table_lines

Results = Mapping[str, Mapping[str, Any]]

# Names that bars are set for: what they begin with, and what it takes to reach the bar.
_BARS = (
    ("evidence_at_L0.same_words.1m", "at least 0.95"),
    ("relative_accuracy.same_words.1m", "at least 0.90"),
    ("lens_minus_lexical.paraphrase.256k", "at least 20 points"),
    ("lens_minus_lexical.two_hop.256k", "at least 20 points"),
    ("regret.prose", "at most 0.02 nats per token"),
    ("swap_rate.prose_calm", "at most 0.05"),
    ("length_retention.1m_over_4k", "at least 0.95"),
    ("refocus_cost_ratio", "at most 2"),
    ("false_answers.no_evidence", "at most 0.10"),
)
_UNITS = {"k": 1_000, "m": 1_000_000}
_FALSE = "false_answers"
_TITLES = {
    "same_words": "same words",
    "codes": "codes and numbers",
    "paraphrase": "other words",
    "corrected": "corrected later",
    "two_hop": "two facts",
    "three_hop": "three facts",
    "babi_qa2": "bAbI qa2, own names",
    "babi_qa3": "bAbI qa3, own names",
    "none": "nothing answers: false answers",
}
_TABLES = (
    ("accuracy", "Answers that are exactly right"),
    ("evidence_at_L0", "Needed blocks that are raw when answering"),
    ("swap_rate", "Edits per entry and refocus"),
    ("refocus_ms", "Milliseconds of a refocus"),
)


class _Place(NamedTuple):
    """Where a result belongs."""

    measure: str
    kind: str
    length: str
    policy: str


def write_focus_report(line: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes ``focus.md`` and ``focus.svg``.

    Args:
        line: what ``megacontext bench focus`` printed.
        folder: where they go; made where missing.

    Returns:
        The files written.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    results = {result["name"]: result for result in line["results"]}
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "focus.svg"
    _draw(results, picture)
    page = folder / "focus.md"
    page.write_text(_page(line, results, picture.name), encoding="utf-8")
    return [page, picture]


def _places(results: Results) -> Iterator[_Place]:
    """The places of all results that belong to a kind, a length and a policy."""
    for name in results:
        parts = name.split(".")
        if len(parts) == 4 and parts[1] in FOCUS_KINDS:
            yield _Place(*parts)


def _tokens(length: str) -> int:
    """``4k`` in tokens."""
    return int(length.rstrip("km")) * _UNITS.get(length[-1], 1)


def _axes(results: Results, measure: str) -> tuple[list[str], list[str], list[str]]:
    """The kinds, lengths and policies that a measure was taken for, in order."""
    places = [place for place in _places(results) if place.measure == measure]
    return (
        [kind for kind in FOCUS_KINDS if any(place.kind == kind for place in places)],
        sorted({place.length for place in places}, key=_tokens),
        [*dict.fromkeys(place.policy for place in places)],
    )


def _page(line: Mapping[str, Any], results: Results, picture: str) -> str:
    lines = [
        "# What the focus finds",
        "",
        "Made by the command below; do not edit by hand.",
        "",
        f"`{line['command']}`, commit `{line['commit']}`, model `{line['model']}`, seed "
        f"{line['seed']}. With 95 % intervals; `n` counts questions.",
        "",
        "Facts and stories that share no names are planted in held-out prose, many in one history,",
        "and asked behind its end. All policies read the same memory with the same budget.",
        "`in window` is the answer with nothing but the evidence and a little prose in the window.",
        "",
        f"![Accuracy against length, by kind of question and policy]({picture})",
        "",
        *_bars(results),
    ]
    for measure, title in _TABLES:
        lines += _table(results, measure, title)
    single = [name for name in results if name.startswith(("regret.", "nll.", "chosen_swap_rate."))]
    single += [name for name in results if name.startswith(("swap_rate.prose", "refocus_cost"))]
    if single:
        lines += [
            "## Prose and cost",
            "",
            *table_lines(
                ["measure", "n", "value"],
                [(f"`{name}`", results[name]["n"], _cell(results[name])) for name in single],
            ),
        ]
    return "\n".join([*lines, ""])


def _bars(results: Results) -> list[str]:
    """The lens's results that bars are set for, as far as they were measured."""
    found = [(name, bar) for name, bar in _BARS if name in results]
    if not found:
        return []
    rows = [(f"`{name}`", results[name]["n"], _cell(results[name]), bar) for name, bar in found]
    return ["## The lens", "", *table_lines(["measure", "n", "value", "bar"], rows), ""]


def _table(results: Results, measure: str, title: str) -> list[str]:
    kinds, lengths, policies = _axes(results, measure)
    if not kinds:
        return []
    head = ["questions", "tokens", "n", *policies]
    alone = measure == "accuracy"
    if alone:
        head.append("in window")
    rows: list[list[Any]] = []
    for kind in kinds:
        for length in lengths:
            row = [results.get(f"{measure}.{kind}.{length}.{policy}") for policy in policies]
            n = max(result["n"] for result in row if result is not None)
            cells = [_cell(result) for result in row]
            if alone:
                cells.append(_cell(results.get(f"accuracy.{kind}.in_window")))
            rows.append([_TITLES[kind] if kind != "none" else kind, length, n, *cells])
    return [f"## {title}", "", *table_lines(head, rows), ""]


def _cell(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return ""
    low, high = result["ci95"]
    digits = 1 if abs(result["value"]) >= 10 else 3
    return f"{result['value']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _draw(results: Results, path: Path) -> None:
    """One panel a kind, one line a policy."""
    pyplot = svg_pyplot()
    kinds, lengths, policies = _axes(results, "accuracy")
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(3.2 * columns, 2.6 * rows + 0.5), sharex=True, sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for axes in grid.flat[len(kinds) :]:
        axes.set_visible(False)
    for kind, axes in zip(kinds, grid.flat, strict=False):
        _draw_kind(results, axes, kind, lengths, policies)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.supxlabel("tokens of history", fontsize="medium")
    figure.supylabel("share of questions", fontsize="medium")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _draw_kind(
    results: Results, axes: Any, kind: str, lengths: Sequence[str], policies: Sequence[str]
) -> None:
    measure = _FALSE if kind == "none" else "accuracy"
    for number, policy in enumerate(policies):
        names = [f"{measure}.{kind}.{length}.{policy}" for length in lengths]
        found = [
            (_tokens(length), results[name])
            for length, name in zip(lengths, names, strict=True)
            if name in results
        ]
        values = [result["value"] for _, result in found]
        errors = [
            [result["value"] - result["ci95"][0] for _, result in found],
            [result["ci95"][1] - result["value"] for _, result in found],
        ]
        # A little apart, so that lines on top of each other can be told.
        places = [tokens * 1.04**number for tokens, _ in found]
        axes.errorbar(
            places, values, yerr=errors, label=policy, marker="o", markersize=3, linewidth=1.2,
            elinewidth=0.6,
        )  # fmt: skip
    alone = results.get(f"accuracy.{kind}.in_window")
    if alone is not None:
        axes.axhline(alone["value"], color="0.5", linestyle="--", linewidth=0.8)
    axes.set_title(_TITLES[kind], fontsize="medium")
    axes.set_xscale("log")
    axes.set_xticks([_tokens(length) for length in lengths], lengths)
    axes.minorticks_off()
    axes.set_ylim(-0.04, 1.04)
    axes.spines[["top", "right"]].set_visible(False)
