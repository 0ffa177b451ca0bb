"""Benchmark results as one JSON line: names, values, n, intervals, and the commit."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacontext.evaluation.metrics import Estimate


def suite_line(suite: str, results: Mapping[str, Estimate], **facts: Any) -> dict[str, Any]:
    """The line that ends a benchmark.

    Args:
        suite: name of the suite.
        results: estimates by their published names.
        facts: whatever else belongs to the run: seed, model, command.
    """
    return {
        "suite": suite,
        "commit": current_commit(),
        **facts,
        "results": [estimate.as_result(name) for name, estimate in results.items()],
    }


def current_commit() -> str:
    """Commit of the checkout this code lies in, ``-dirty`` if changed; ``unknown`` without git."""
    folder = Path(__file__).resolve().parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],  # noqa: S607
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip()
