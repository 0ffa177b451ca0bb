"""Fills tables of numbers in documents: ``python -m tools.fill_tables --config FILE``."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megacontext.config import FrozenConfig
from megacontext.errors import DataError
from megacontext.evaluation.markdown_table import table_lines
from tools._entry import tool_main

Results = Mapping[str, Mapping[str, Any]]

_PLACE = re.compile(r"\{(?P<file>\w+):(?P<name>[^{}:]+)(?::(?P<form>\d|n))?\}")


class Table(FrozenConfig):
    """A table between ``<!-- table NAME -->`` and ``<!-- end of table -->``.

    In every cell ``{FILE:RESULT}`` stands for a result with its 95 % interval, two digits each;
    ``{FILE:RESULT:4}`` gives four, ``{FILE:RESULT:n}`` the number of samples.

    Attributes:
        page: document that holds it.
        head: cells of its first row.
        rows: cells of the others.
    """

    page: Path
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class FillTablesConfig(FrozenConfig):
    """Which tables there are, and where their numbers come from.

    Attributes:
        results: files that benchmarks wrote with ``--json``, by the name that cells call them.
        tables: by the name in the page.
        check: change nothing; refuse pages that do not say what the results say.
    """

    results: dict[str, Path]
    tables: dict[str, Table]
    check: bool = False


def run(config: FillTablesConfig) -> dict[str, Any]:
    """Writes the pages whose tables have changed, and names them.

    Raises:
        DataError: a file, a result or a table's place is missing; or, to check, a page is outdated.
    """
    results = {name: _read(path) for name, path in config.results.items()}
    pages: dict[Path, str] = {}
    for name, table in config.tables.items():
        text = pages.get(table.page) or _text(table.page)
        pages[table.page] = _filled(text, name, table, results)
    changed = [path for path, text in pages.items() if text != _text(path)]
    if config.check and changed:
        raise DataError(
            f"{', '.join(map(str, changed))}: the tables say other numbers than the results; "
            "run python -m tools.fill_tables --config configs/tables.yaml"
        )
    for path in changed:
        path.write_text(pages[path], encoding="utf-8")
    return {"changed": [str(path) for path in changed]}


def _filled(text: str, name: str, table: Table, results: Mapping[str, Results]) -> str:
    opening, closing = f"<!-- table {name} -->\n", "<!-- end of table -->"
    before, found, rest = text.partition(opening)
    _, ended, after = rest.partition(closing)
    if not found or not ended:
        raise DataError(
            f"{table.page}: no place for table {name!r}; mark it with {opening.strip()} and "
            f"{closing}"
        )

    def value(match: re.Match[str]) -> str:
        return _value(results, match["file"], match["name"], match["form"] or "2")

    rows = [tuple(_PLACE.sub(value, cell) for cell in row) for row in table.rows]
    if any(len(row) != len(table.head) for row in rows):
        raise DataError(f"table {name!r}: every row needs {len(table.head)} cells, as the head has")
    lines = table_lines(table.head, rows)
    return "\n".join([f"{before}{opening}", *lines, f"\n{closing}{after}"])


def _value(results: Mapping[str, Results], file: str, name: str, form: str) -> str:
    result = results.get(file, {}).get(name)
    if result is None:
        raise DataError(f"no result {name!r} in the file {file!r}; name one that was measured")
    if form == "n":
        return f"{result['n']:,}"
    number, (low, high) = result["value"], result["ci95"]
    return f"{number:.{form}f} ({low:.{form}f} – {high:.{form}f})"


def _read(path: Path) -> Results:
    try:
        line = json.loads(_text(path).splitlines()[-1])
        return {result["name"]: result for result in line["results"]}
    except (ValueError, LookupError, TypeError):
        raise DataError(f"{path}: no results of a benchmark; write them with --json") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Fills tables of numbers in documents from what benchmarks wrote.",
        FillTablesConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
