"""The JSON line of the suite ``proof``, read back: what is in it, by what it is called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from megacontext.errors import DataError
from megacontext.evaluation.proof_config import MAIN

Result = Mapping[str, Any]
"""``value``, ``n`` and ``ci95`` of one name."""


@dataclass(frozen=True)
class ProofLine:
    """A run's results.

    Attributes:
        line: the whole line.
        results: by name.
    """

    line: Mapping[str, Any]
    results: Mapping[str, Result]

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> Self:
        """Reads a line that was parsed already."""
        return cls(line, {result["name"]: result for result in line["results"]})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads the file that ``megacontext bench proof --json FILE`` wrote.

        Raises:
            DataError: it cannot be read, or holds no results of this suite.
        """
        try:
            line = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
            found = cls.of(line) if line["suite"] == "proof" else None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        except (ValueError, LookupError, TypeError):
            found = None
        if found is None:
            raise DataError(f"{path}: no results of the suite proof; write them with --json {path}")
        return found

    @property
    def rivals(self) -> list[str]:
        """Those who were asked."""
        return self.line["rivals"]

    @property
    def lengths(self) -> list[str]:
        """Of all histories, ascending."""
        return self.line["lengths"]

    @property
    def tasks(self) -> dict[str, list[str]]:
        """Tasks by family; families without any left out."""
        return {family: tasks for family, tasks in self.line["tasks"].items() if tasks}

    @property
    def prose(self) -> dict[str, dict[str, list[float]]]:
        """``positions`` and ``nll`` by rival."""
        return self.line["prose"]

    def get(self, name: str, rival: str) -> Result | None:
        """A rival's result, if there is one."""
        return self.results.get(name if rival == MAIN else f"{name}.{rival}")

    def by_length(self, name: str, rival: str) -> dict[str, float]:
        """Values of ``name.LENGTH`` that a rival has."""
        found = {length: self.get(f"{name}.{length}", rival) for length in self.lengths}
        return {length: result["value"] for length, result in found.items() if result is not None}

    def family_means(self, family: str, rival: str) -> dict[str, float]:
        """Mean over a family's tasks, at the lengths at which a rival has all of them."""
        tasks = self.tasks[family]
        by_task = [self.by_length(f"{family}.{task}", rival) for task in tasks]
        return {
            length: sum(values[length] for values in by_task) / len(tasks)
            for length in self.lengths
            if all(length in values for values in by_task)
        }

    def depths(self) -> dict[tuple[str, float], float]:
        """Share of right answers of MegaContext by length and depth of the needle."""
        found: dict[tuple[str, float], float] = {}
        for name, result in self.results.items():
            family, _, place = name.partition(".")
            if family == "niah_depth":
                length, _, depth = place.partition(".")
                found[length, float(depth)] = result["value"]
        return found
