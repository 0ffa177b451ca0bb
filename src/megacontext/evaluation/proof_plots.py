"""The pictures of the suite ``proof``, drawn from its JSON line alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from megacontext.evaluation.figures import svg_pyplot
from megacontext.evaluation.proof_config import MAIN, tokens_of
from megacontext.evaluation.proof_line import ProofLine

_MARKERS = "osD^v<>PX*hdp"
_BINS = 20
# Upper bounds, drawn apart from competitors.
_BOUNDS = ("oracle", "full")


def draw_all(line: ProofLine, folder: Path) -> dict[str, Path]:
    """Draws what there are results for, as SVG: the same file on every run.

    Args:
        line: the results.
        folder: where pictures go; made where missing.

    Returns:
        Files by name: ``accuracy``, ``nll``, ``time``, ``depth``.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    pyplot = svg_pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Any, ProofLine], Any]] = {
        "accuracy": _accuracy,
        "nll": _nll,
        "time": _time,
        "depth": _depth,
    }
    drawn: dict[str, Path] = {}
    for name, draw in pictures.items():
        figure = draw(pyplot, line)
        if figure is not None:
            drawn[name] = folder / f"{name}.svg"
            figure.savefig(drawn[name], metadata={"Date": None})
            pyplot.close(figure)
    return drawn


def _accuracy(pyplot: Any, line: ProofLine) -> Any:
    """Mean accuracy of each family of tasks against length, one line a rival."""
    panels = {
        family: {rival: line.family_means(family, rival) for rival in line.rivals}
        for family in line.tasks
    }
    panels = {family: curves for family, curves in panels.items() if any(curves.values())}
    if not panels:
        return None
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1.5 + 3.4 * len(panels), 4), sharey=True, layout="constrained"
    )
    for place, (family, curves) in zip(_each(axes), panels.items(), strict=True):
        for rival, curve in curves.items():
            _curve(place, line, rival, curve)
        place.set_title(f"{family}, mean of {len(line.tasks[family])} tasks", fontsize="medium")
        place.set_ylim(-0.03, 1.03)
        _tidy(place, line.lengths)
    _each(axes)[0].set_ylabel("right answers")
    _legend(figure, axes)
    return figure


def _nll(pyplot: Any, line: ProofLine) -> Any:
    """NLL against position in the stream, as means over equal parts of it."""
    if not line.prose:
        return None
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    for rival, stream in line.prose.items():
        places, values = _binned(stream["positions"], stream["nll"])
        axes.plot(places, values, label=rival, **_style(line, rival))
    axes.set_xlabel("position in the stream (tokens)")
    axes.set_ylabel("NLL (nats per token)")
    axes.spines[["top", "right"]].set_visible(False)
    _legend(figure, axes)
    return figure


def _time(pyplot: Any, line: ProofLine) -> Any:
    """Seconds per answer against length; an index that a rival makes is left out."""
    curves = {rival: line.by_length("seconds_per_answer", rival) for rival in line.rivals}
    if not any(curves.values()):
        return None
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for rival, curve in curves.items():
        _curve(axes, line, rival, curve)
    axes.set_yscale("log")
    axes.set_ylabel("seconds per answer")
    _tidy(axes, line.lengths)
    _legend(figure, axes)
    return figure


def _depth(pyplot: Any, line: ProofLine) -> Any:
    """Right answers of MegaContext for a needle at each depth of each length."""
    cells = line.depths()
    if not cells:
        return None
    lengths = [length for length in line.lengths if any(key[0] == length for key in cells)]
    depths = sorted({depth for _, depth in cells})
    shares = [[cells.get((length, depth), float("nan")) for length in lengths] for depth in depths]
    size = (2.5 + 0.9 * len(lengths), 1.5 + 0.5 * len(depths))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    picture = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (length, depth), share in cells.items():
        colour = "black" if share > 0.6 else "white"
        place = lengths.index(length), depths.index(depth)
        axes.text(*place, f"{share:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(lengths)), lengths)
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
    axes.set_xlabel("length of the history (tokens)")
    axes.set_ylabel("depth of the needle")
    figure.colorbar(picture, label="right answers")
    return figure


def _curve(axes: Any, line: ProofLine, rival: str, curve: Mapping[str, float]) -> None:
    if curve:
        places = [tokens_of(length) for length in curve]
        axes.plot(places, list(curve.values()), label=rival, **_style(line, rival))


def _style(line: ProofLine, rival: str) -> dict[str, Any]:
    number = line.rivals.index(rival)
    style: dict[str, Any] = {
        "marker": _MARKERS[number % len(_MARKERS)],
        "markersize": 4,
        "color": "black" if rival == MAIN else f"C{number % 10}",
        "linewidth": 2.2 if rival == MAIN else 1.1,
        "zorder": 3 if rival == MAIN else 2,
    }
    return style | {"linestyle": "--" if rival in _BOUNDS else "-"}


def _tidy(axes: Any, lengths: Sequence[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([tokens_of(length) for length in lengths], lengths)
    axes.minorticks_off()
    axes.set_xlabel("length of the history (tokens)")
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Any, axes: Any) -> None:
    """One for all panels: the same rival looks the same in each."""
    known: dict[str, Any] = {}
    for place in _each(axes):
        handles, labels = place.get_legend_handles_labels()
        known |= dict(zip(labels, handles, strict=True))
    figure.legend(
        list(known.values()),
        list(known),
        loc="outside right upper",
        frameon=False,
        fontsize="small",
    )


def _each(axes: Any) -> list[Any]:
    return list(axes.flat) if hasattr(axes, "flat") else [axes]


def _binned(positions: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over at most :data:`_BINS` runs of neighbours, as equal in number as can be."""
    bins = min(_BINS, len(values))
    edges = [len(values) * number // bins for number in range(bins + 1)]
    parts = [slice(a, b) for a, b in pairwise(edges)]
    return [_mean(positions[part]) for part in parts], [_mean(values[part]) for part in parts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
