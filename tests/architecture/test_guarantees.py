"""Every promise of docs/guarantees.md names a test, and every test it names is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from architecture.repository import ROOT

PAGE = "docs/guarantees.md"
REFERENCE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
UNHELD = {"Not promised"}


def promises(page: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Each point of each section that promises something, with the tests it names."""
    found: list[tuple[str, list[tuple[str, str]]]] = []
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        if section.splitlines()[0] in UNHELD:
            continue
        points = re.split(r"^- ", section, flags=re.MULTILINE)[1:]
        found += [(point.splitlines()[0], REFERENCE.findall(point)) for point in points]
    return found


@cache
def names_in(path: Path) -> frozenset[str]:
    """Names that pytest collects from a file: of functions, and of classes however made."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names |= {node.name} if node.name.startswith(("test_", "Test")) else set()
        elif isinstance(node, ast.Assign):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
            names |= {name for name in targets if name.startswith("Test")}
    return frozenset(names)


def missing(root: Path, references: list[tuple[str, str]]) -> list[str]:
    return [
        f"{file}::{name}"
        for file, name in references
        if not (root / file).is_file() or name not in names_in(root / file)
    ]


PROMISES = promises((ROOT / PAGE).read_text(encoding="utf-8"))


def test_there_are_promises():
    assert len(PROMISES) > 20


@pytest.mark.parametrize(("promise", "references"), PROMISES, ids=[point for point, _ in PROMISES])
def test_every_promise_is_held_by_a_test(promise, references):
    assert references, f"{PAGE}: no test holds {promise!r}"
    assert not missing(ROOT, references), f"{PAGE}: {promise!r}"


def test_every_test_named_on_the_page_is_written_so_that_it_is_checked():
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    checked = [reference for _, references in PROMISES for reference in references]
    assert page.count("tests/") == len(checked) + 1, "one names this file itself"


def test_a_promise_without_a_test_and_a_test_that_is_gone_are_seen(tmp_path):
    page = (
        "# Page\n\n## Kept\n\n- One.\n  Held by `tests/a.py::test_one`,\n  `tests/a.py::TestTwo`.\n"
        "- Two.\n  Held by `tests/a.py::test_gone`, `tests/b.py::test_one`.\n- Three.\n"
        "\n## Not promised\n\n- Four.\n"
    )
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "a.py").write_text("def test_one(): ...\nTestTwo = object\n")
    one, two, three = promises(page)
    assert missing(tmp_path, one[1]) == []
    assert missing(tmp_path, two[1]) == ["tests/a.py::test_gone", "tests/b.py::test_one"]
    assert three == ("Three.", [])
