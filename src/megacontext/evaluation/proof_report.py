"""The suite ``proof`` as a page: tables and pictures, made from its JSON line."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megacontext.evaluation.markdown_table import table_lines
from megacontext.evaluation.proof_cells import COUNTING
from megacontext.evaluation.proof_config import WINDOW
from megacontext.evaluation.proof_line import ProofLine, Result
from megacontext.evaluation.proof_plots import draw_all

# What was to be shown: name, least value, and the value aimed at.
_BARS = (
    ("babilong.qa1-5.128k", 0.70, 0.97),
    ("babilong.qa1-5.1m", 0.60, 0.93),
    ("babilong.qa1.10m", 0.60, 0.90),
    ("lead.recall.128k", 10.0, 30.0),
    ("ruler.niah_single.1m", 0.95, 1.0),
    ("prose_nll_gain.100k", 0.0, 0.02),
)
_TITLES = {"babilong": "BABILong", "ruler": "RULER", "recall": "Planted facts"}
_NOTHING = "–"


def write_report(
    line: ProofLine, page: Path, pictures: Path, title: str = "The proof, measured"
) -> list[Path]:
    """Writes a Markdown page and its pictures.

    Args:
        line: the results.
        page: the page; its folder is made where missing.
        pictures: folder of the pictures.
        title: of the page.

    Returns:
        The files written.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    drawn = draw_all(line, pictures)
    page.parent.mkdir(parents=True, exist_ok=True)
    links = {
        name: Path(os.path.relpath(path, page.parent)).as_posix() for name, path in drawn.items()
    }
    page.write_text("\n".join([f"# {title}", *_page(line, links), ""]), encoding="utf-8")
    return [page, *drawn.values()]


def _page(line: ProofLine, links: dict[str, str]) -> Iterator[str]:
    yield ""
    yield "Made from the JSON line of the command below; do not edit by hand."
    yield ""
    yield from _how(line)
    yield from _to_be_shown(line)
    yield from _picture(links, "accuracy", "Right answers against the length of the history")
    for family, tasks in line.tasks.items():
        yield from _family(line, family, tasks)
    yield from _picture(links, "depth", "MegaContext by depth of the needle (niah_single)")
    yield from _lead(line)
    yield from _stream(line, links)
    yield from _evidence(line)
    yield from _costs(line, links)
    yield from _not_asked(line)


def _how(line: ProofLine) -> Iterator[str]:
    facts, setup = line.line, line.line["setup"]
    yield f"`{facts['command']}`, commit `{facts['commit']}`, seed {facts['seed']}."
    yield ""
    rows = {
        "base model": f"`{facts['model']}` ({setup['dtype']} on {setup['device']}, weights "
        f"`{setup['base_digest']}`)",
        "GistNet, LensNet": f"`{setup['gistnet']}`, `{setup['lens']}`",
        "budget": f"{setup['budget']} token-equivalents for every rival: what it reads of the "
        "history, the prompt and the answer",
        "focus policy": f"`{setup['policy']}`; {setup['tail_tokens']} newest tokens raw in prose, "
        f"{setup['asked_tail_tokens']} for a question",
        "order of what is read": f"`{setup['positions']}`",
        "noise": ", ".join(setup["noise"]),
        "questions in a cell": f"{setup['questions']}"
        + "".join(f"; {n} at {length}" for length, n in setup["questions_at"].items())
        + _of(f"; {setup['slow_questions']} for ", setup["slow_rivals"]),
        "wording of RULER": f"`{setup['wording']}`",
        "planted facts": f"{setup['facts']} in a history, {setup['asked']} asked "
        "(`corrections`: 1)",
        "measured with commits": ", ".join(f"`{commit}`" for commit in facts["commits"]),
        "machine": f"{setup['machine']}, {setup['cores']} cores, {setup['threads']} threads; "
        f"Python {setup['python']}, torch {setup['torch']}, transformers {setup['transformers']}",
    }
    yield from table_lines(["set-up", ""], rows.items())
    yield ""
    yield "Every number stands with its 95 % interval: Wilson's for shares of right answers,"
    yield "percentile bootstrap for means. A dash means that nobody was asked; the last section"
    yield "says why. `oracle` is told the answer and where it stands, `full` reads more than the"
    yield "budget: both are bounds, not rivals."


def _to_be_shown(line: ProofLine) -> Iterator[str]:
    if not any(name in line.results for name, *_ in _BARS):
        return
    yield from _heading("What was to be shown")
    rows: list[list[str]] = []
    for name, bar, aim in _BARS:
        result = line.results.get(name)
        reached = "not measured"
        if result is not None:
            reached = "yes" if result["value"] >= bar else "**no**"
        n = _NOTHING if result is None else str(result["n"])
        value = _cell(result, digits=4 if name.startswith("prose_nll_gain") else 2)
        rows.append([f"`{name}`", n, value, f"≥ {bar:g}", f"{aim:g}", reached])
    yield from table_lines(["measure", "n", "value", "bar", "aim", "reached"], rows)


def _family(line: ProofLine, family: str, tasks: Sequence[str]) -> Iterator[str]:
    yield from _heading(_TITLES.get(family, family))
    if family == "ruler":
        yield "A task with several answers counts the share of them that was named. Where all of"
        yield f"the text is evidence ({', '.join(COUNTING)}) the oracle has nothing to tell."
        yield ""
    names = [*tasks, "qa1-5"] if family == "babilong" else list(tasks)
    yield from _by_rival(line, [(task, f"{family}.{task}") for task in names])


def _lead(line: ProofLine) -> Iterator[str]:
    leads = {name: result for name, result in line.results.items() if name.startswith("lead.")}
    if not leads:
        return
    yield from _heading("Lead in recall")
    yield "MegaContext minus each rival at equal budget, mean over the recall tasks, in points, on"
    yield "the questions that both were asked. The name without a rival is the smallest lead."
    yield ""
    rows = [[f"`{name}`", str(result["n"]), _cell(result)] for name, result in leads.items()]
    yield from table_lines(["measure", "n", "points"], rows)


def _stream(line: ProofLine, links: dict[str, str]) -> Iterator[str]:
    if not line.prose:
        return
    length = line.line["prose_length"]
    yield from _heading("Prose")
    yield f"NLL in nats per token of blocks spread over {length} tokens of one book that no"
    yield f"training has seen, and what a rival gains over `{WINDOW}` on the same blocks."
    yield ""
    rows: list[list[str]] = []
    for rival in line.rivals:
        loss = line.get(f"prose_nll.{length}", rival)
        if loss is not None:
            gain = line.get(f"prose_nll_gain.{length}", rival)
            rows.append([rival, str(loss["n"]), _cell(loss), _cell(gain, digits=4)])
    yield from table_lines(["rival", "blocks", "NLL", "gain"], rows)
    yield from _picture(links, "nll", "NLL against position in the stream")


def _evidence(line: ProofLine) -> Iterator[str]:
    names = [
        (task, f"evidence_at_L0.{task}")
        for tasks in line.tasks.values()
        for task in tasks
        if any(name.startswith(f"evidence_at_L0.{task}.") for name in line.results)
    ]
    if not names:
        return
    yield from _heading("Evidence in detail")
    yield "Share of the statements needed that were read raw, each as a whole, when the answer"
    yield "began. Where MegaContext answers in notes, its focus moves on after each of them."
    yield ""
    yield from _by_rival(line, names)


def _costs(line: ProofLine, links: dict[str, str]) -> Iterator[str]:
    yield from _heading("Time and memory")
    totals = ("ingest_tokens_per_s", "peak_rss_mb")
    rows = [
        [f"`{name}`", f"{line.results[name]['n']}", _cell(line.results[name], digits=0)]
        for name in totals
        if name in line.results
    ]
    yield from table_lines(["measure", "n", "value"], rows)
    for name, text in (
        ("seconds_per_answer", "Seconds per answer, mean over all tasks:"),
        ("seconds_to_index", "Seconds in which a rival indexed a history for itself:"),
        ("swap_rate", "Edits per entry and refocus of rivals that have a focus:"),
    ):
        table = list(_by_rival(line, [(name, name)]))
        if table:
            yield from ("", text, "")
            yield from table
    yield from _picture(links, "time", "Seconds per answer against the length of the history")


def _not_asked(line: ProofLine) -> Iterator[str]:
    setup = line.line["setup"]
    rows = [(rival, _reading(rival, setup)) for rival in setup["readers"]]
    for rival, cells in line.line["refused"].items():
        cell, reason = next(iter(cells.items()))
        rows.append((rival, f"refused in {len(cells)} cells, the first `{cell}`: {reason}"))
    if rows:
        yield from _heading("Who was not asked, or refused")
        yield from table_lines(["rival", "why"], rows)


def _reading(rival: str, setup: Mapping[str, Any]) -> str:
    """Why a rival that reads histories with a model was not asked about long ones."""
    beyond = f"not asked beyond {setup['readers_up_to']}"
    if rival in setup.get("readers_by_question", ()):
        return f"{beyond}: it reads all of a history with a model, anew for every question"
    skipped = ", ".join(setup.get("readers_skip", ()))
    shared = f"{setup['readers_recall_up_to']} for planted facts and prose"
    but = f", not at {skipped}" if skipped else ""
    return f"{beyond} ({shared}{but}): it reads all of a history with a model first"


def _by_rival(line: ProofLine, names: Sequence[tuple[str, str]]) -> Iterator[str]:
    """One row a task and length, one column a rival; nothing where there is no result."""
    rows: list[tuple[str, str, list[Result | None]]] = []
    for title, name in names:
        for length in line.lengths:
            results = [line.get(f"{name}.{length}", rival) for rival in line.rivals]
            if any(result is not None for result in results):
                rows.append((title, length, results))
    if not rows:
        return
    shown = [i for i in range(len(line.rivals)) if any(row[2][i] is not None for row in rows)]
    yield from table_lines(
        ["task", "length", "n", *(line.rivals[index] for index in shown)],
        (
            [title, length, _counts(results), *(_cell(results[index]) for index in shown)]
            for title, length, results in rows
        ),
    )


def _counts(results: Iterable[Result | None]) -> str:
    """How many samples there are; two numbers where rivals differ."""
    counts = sorted({result["n"] for result in results if result is not None}, reverse=True)
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} ({counts[-1]})"


def _heading(text: str) -> Iterator[str]:
    yield from ("", f"## {text}", "")


def _picture(links: dict[str, str], name: str, text: str) -> Iterator[str]:
    if name in links:
        yield from ("", f"![{text}]({links[name]})")


def _cell(result: Result | None, digits: int = 2) -> str:
    if result is None:
        return _NOTHING
    value, (low, high) = result["value"], result["ci95"]
    if result["n"] == 1:
        return f"{value:,.{digits}f}"
    return f"{value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def _of(before: str, names: Sequence[str]) -> str:
    return before + ", ".join(names) if names else ""
