"""Matplotlib for the pictures of reports."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from megacontext.errors import ConfigError


def svg_pyplot() -> Any:
    """Pyplot without a display, whose SVG files have text as text and are the same on every run.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        matplotlib: Any = importlib.import_module("matplotlib")
    except ImportError:
        raise ConfigError(
            "the report needs matplotlib; install the extra `megacontext[train]`"
        ) from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "megacontext"})
    return importlib.import_module("matplotlib.pyplot")


def color_map(colors: Sequence[str]) -> Any:
    """A colour map of exactly these colours, for whole numbers from 0; needs matplotlib."""
    return importlib.import_module("matplotlib.colors").ListedColormap(list(colors))
