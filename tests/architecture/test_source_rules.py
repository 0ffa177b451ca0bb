"""Rules for the source that no linter knows."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator

import pytest
from architecture.repository import ROOT, python_files, text_lines

MOST_FILE_LINES = 500
MOST_FUNCTION_LINES = 60
UNSAFE_MODULES = {"cPickle", "cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNSAFE_CALLS = {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"}


def long_functions(source: str) -> list[str]:
    return [
        f"{node.name} (line {node.lineno}, {length} lines)"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) >= MOST_FUNCTION_LINES
    ]


def unsafe_reading(source: str) -> Iterator[str]:
    """What runs code from a file that it reads, or writes files that can only be read so."""
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            for alias in node.names:
                if f"{node.module}.{alias.name}" in UNSAFE_CALLS:
                    yield f"line {node.lineno}: imports {node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in UNSAFE_CALLS:
            yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield f"line {node.value.lineno}: allow_pickle"
        for module in modules:
            if module.split(".")[0] in UNSAFE_MODULES:
                yield f"line {node.lineno}: imports {module}"


def test_files_stay_short():
    long = {
        str(path): lines
        for path in python_files("src", "tools", "tests", "benchmarks")
        if (lines := len(text_lines(path))) >= MOST_FILE_LINES
    }
    assert not long, f"{MOST_FILE_LINES} lines or more, split by concept: {long}"


def broken_by(rule: Callable[[str], Iterable[str]]) -> dict[str, list[str]]:
    """What the rule finds in our code, by file."""
    found = {
        str(path): list(rule((ROOT / path).read_text(encoding="utf-8")))
        for path in python_files("src", "tools")
    }
    return {path: findings for path, findings in found.items() if findings}


def test_functions_stay_short():
    long = broken_by(long_functions)
    assert not long, f"{MOST_FUNCTION_LINES} lines or more: {long}"


def test_no_file_that_is_read_can_run_code():
    assert not broken_by(unsafe_reading)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
    ],
)
def test_unsafe_reading_is_seen(source):
    assert list(unsafe_reading(source))


def test_a_long_function_is_seen():
    body = "    pass\n"
    assert long_functions("def f():\n" + body * (MOST_FUNCTION_LINES - 1))
    assert not long_functions("def f():\n" + body * (MOST_FUNCTION_LINES - 2))
