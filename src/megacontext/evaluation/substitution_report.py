"""The suite ``substitution`` as a page: a table and a picture, made from its JSON line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacontext.evaluation.figures import svg_pyplot
from megacontext.evaluation.markdown_table import table_lines

_COLUMNS = (
    ("ΔNLL", "delta_nll"),
    ("degradation", "degradation"),
    ("recovered", "recovered"),
    ("by mean gist", "recovered.mean"),
    ("by recency", "recovered.recency"),
    ("substitutable", "substitutability"),
)
_VARIANTS = ("full", "gist", "mean", "recency", "dropped")
_SINGLE = (
    "equal_budget_gain.prose",
    "answers.full",
    "answers.gist",
    "answers.no_evidence",
    "gist_only_answer_gain",
    "fidelity.rank_correlation",
    "ingest_ratio",
)
Results = Mapping[str, Mapping[str, Any]]


def write_report(line: Mapping[str, Any], folder: Path, *, horizon: int = 64) -> list[Path]:
    """Writes ``substitution.md`` and ``substitution.svg``.

    Args:
        line: what ``megacontext bench substitution`` printed.
        folder: where they go; made where missing.
        horizon: tokens behind the span that the table tells of.

    Returns:
        The files written.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    results = {result["name"]: result for result in line["results"]}
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "substitution.svg"
    _draw(results, picture, horizon)
    page = folder / "substitution.md"
    page.write_text(_page(line, results, picture.name, horizon), encoding="utf-8")
    return [page, picture]


def _shapes(results: Results, horizon: int) -> list[str]:
    prefix = f"degradation@{horizon}."
    return [name.removeprefix(prefix) for name in results if name.startswith(prefix)]


def _page(line: Mapping[str, Any], results: Results, picture: str, horizon: int) -> str:
    shapes: list[list[Any]] = []
    for shape in _shapes(results, horizon):
        source, _, spans = shape.partition(".")
        n = results[f"degradation@{horizon}.{shape}"]["n"]
        cells = [_cell(results[f"{name}@{horizon}.{shape}"]) for _, name in _COLUMNS]
        shapes.append([source, spans, n, *cells])
    families = sorted(name for name in results if name.startswith("answers.gist."))
    rest = [
        (f"`{name}`", results[name]["n"], _cell(results[name]))
        for name in (*_SINGLE, *families)
        if name in results
    ]
    lines = [
        "# Gists in place of tokens",
        "",
        "Made by the command below; do not edit by hand.",
        "",
        f"`{line['command']}`, commit `{line['commit']}`, model `{line['model']}`, seed "
        f"{line['seed']}. Means with 95 % bootstrap intervals.",
        "",
        f"![NLL of the next {horizon} tokens by what is read]({picture})",
        "",
        f"## The next {horizon} tokens",
        "",
        "`N` spans of 32 tokens (L2: one of 1,024) are read as gists. `ΔNLL` is what that costs in",
        "nats per token against reading everything raw, `degradation` its share of the NLL, and",
        "`recovered` the share of what the spans are worth that their gists keep; the two columns",
        "after it say the same of the mean of the spans' embeddings and of as many raw recent",
        "tokens as the gists have entries. `substitutable` is the share of windows whose",
        "degradation is at most 5 %.",
        "",
        *table_lines(["text", "spans", "n", *(title for title, _ in _COLUMNS)], shapes),
        "",
        "## The rest",
        "",
        *table_lines(["measure", "n", "value"], rest),
    ]
    return "\n".join([*lines, ""])


def _cell(result: Mapping[str, Any]) -> str:
    low, high = result["ci95"]
    return f"{result['value']:.3f} ({low:.3f} to {high:.3f})"


def _draw(results: Results, path: Path, horizon: int) -> None:
    """Bars of NLL by variant, one group a window shape."""
    pyplot = svg_pyplot()
    shapes = _shapes(results, horizon)
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.1 * len(shapes), 4), layout="constrained")
    width = 0.8 / len(_VARIANTS)
    for index, variant in enumerate(_VARIANTS):
        found = [results[f"nll.{variant}@{horizon}.{shape}"] for shape in shapes]
        heights = [result["value"] for result in found]
        errors = [
            [result["value"] - result["ci95"][0] for result in found],
            [result["ci95"][1] - result["value"] for result in found],
        ]
        places = [group + (index - 2) * width for group in range(len(shapes))]
        axes.bar(places, heights, width, yerr=errors, label=variant, error_kw={"linewidth": 0.6})
    axes.set_xticks(range(len(shapes)), [shape.replace(".", "\n", 1) for shape in shapes])
    axes.set_ylabel(f"NLL of the next {horizon} tokens (nats)")
    axes.legend(ncols=len(_VARIANTS), frameon=False, fontsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
