"""Every notebook runs from its first cell to its last, here with a budget of a few steps."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from command_line import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BUDGET = {"STEPS": 2, "ROWS": 2, "WINDOWS": 3}
NUMBER = re.compile(r"-?\d+\.\d+")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: Any) -> str:
    """What a cell printed and returned, as plain text."""
    return "\n".join(
        output.get("text") or output.get("data", {}).get("text/plain", "")
        for output in cell.outputs
        if output.get("name") != "stderr"
    )


@pytest.fixture(scope="module")
def executed(tmp_path_factory) -> dict[str, Any]:
    """The notebooks by name, with the outputs of a run in an empty folder."""
    done: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in BUDGET.items():
            patch.setenv(f"MEGACONTEXT_NOTEBOOK_{name}", str(value))
        for path in NOTEBOOKS:
            folder = tmp_path_factory.mktemp(path.stem)
            for variable in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
                patch.setenv(variable, str(folder))
            notebook = nbformat.read(path, as_version=4)
            resources = {"metadata": {"path": str(folder)}}
            NotebookClient(notebook, timeout=600, resources=resources).execute()
            done[path.stem] = notebook
    return done


def test_there_is_a_notebook():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_without_outputs(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_first_code_cell_installs_only_what_is_missing(path: Path, executed):
    first = code_cells(executed[path.stem])[0]
    assert 'find_spec("megacontext") is None' in first.source
    assert first.outputs == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_shows_numbers_and_a_plot(path: Path, executed):
    cells = code_cells(executed[path.stem])
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert NUMBER.search("\n".join(map(texts, cells)))


def test_the_gistnet_notebook_measures_every_variant(executed):
    cells = {cell.id: cell for cell in code_cells(executed["gistnet"])}
    assert f"{BUDGET['STEPS']} steps" in texts(cells["training"])
    measured = texts(cells["measuring"])
    assert f"{BUDGET['WINDOWS']} windows" in measured
    rows = {
        re.split(r"\s{2,}", line)[0]: [float(number) for number in NUMBER.findall(line)]
        for line in measured.splitlines()
        if line.startswith(("full ", "mean ", "dropped ", "gist "))
    }
    assert set(rows) - {"gist (bundled)"} == {"full", "gist", "mean", "dropped"}
    for nll, low, high, *_ in rows.values():
        assert 0 < low <= nll <= high < math.log(2**16)
    degradation, recovered = rows["full"][3:]
    assert (degradation, recovered) == (0.0, 100.0)
    assert rows["dropped"][4] == 0.0
    assert rows["gist"][0] != rows["mean"][0]
