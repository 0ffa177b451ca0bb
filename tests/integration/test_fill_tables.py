"""Tables of numbers in documents, filled from the results of benchmarks."""

from __future__ import annotations

import json

import pytest
import yaml
from architecture.repository import ROOT

from megacontext.config import load_config
from tools import fill_tables

RESULTS = {
    "results": [
        {"name": "accuracy.a", "value": 0.5, "n": 1200, "ci95": [0.4, 0.6]},
        {"name": "gain", "value": -0.00031, "n": 7, "ci95": [-0.0012, 0.0008]},
    ]
}
PAGE = "Before.\n\n<!-- table one -->\nold\n<!-- end of table -->\n\nAfter.\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.json").write_text(json.dumps(RESULTS))
    (tmp_path / "page.md").write_text(PAGE)
    return tmp_path


def config(folder, rows, page="page.md", **more):
    table = {"page": page, "head": ["", "right"], "rows": rows}
    path = folder / "tables.yaml"
    path.write_text(yaml.safe_dump({"results": {"r": "r.json"}, "tables": {"one": table}, **more}))
    return f"--config={path}"


def test_a_table_is_filled_and_the_rest_of_the_page_stays(folder, capsys):
    rows = [["a", "{r:accuracy.a}; of {r:accuracy.a:n}"], ["b", "{r:gain:4}"]]
    assert fill_tables.main([config(folder, rows)]) == 0
    assert capsys.readouterr().out == "changed: ['page.md']\n"
    filled = (folder / "page.md").read_text()
    assert filled == (
        "Before.\n\n<!-- table one -->\n\n"
        "|  | right |\n| --- | --- |\n"
        "| a | 0.50 (0.40 – 0.60); of 1,200 |\n| b | -0.0003 (-0.0012 – 0.0008) |\n\n"
        "<!-- end of table -->\n\nAfter.\n"
    )
    assert fill_tables.main([config(folder, rows)]) == 0
    assert capsys.readouterr().out == "changed: []\n"
    assert (folder / "page.md").read_text() == filled


def test_a_check_refuses_a_page_that_says_something_else(folder, capsys):
    arguments = [config(folder, [["a", "{r:accuracy.a}"]]), "--set=check=true"]
    assert fill_tables.main(arguments) == 2
    assert "page.md: the tables say other numbers" in capsys.readouterr().err
    assert (folder / "page.md").read_text() == PAGE
    fill_tables.main(arguments[:1])
    assert fill_tables.main(arguments) == 0


@pytest.mark.parametrize(
    ("rows", "page", "complaint"),
    [
        ([["a", "{r:accuracy.b}"]], "page.md", "no result 'accuracy.b' in the file 'r'"),
        ([["a", "{s:accuracy.a}"]], "page.md", "in the file 's'"),
        ([["a"]], "page.md", "every row needs 2 cells"),
        ([], "none.md", "none.md: cannot be read"),
        ([], "r.json", "r.json: no place for table 'one'"),
    ],
)
def test_what_is_missing_is_named(rows, page, complaint, folder, capsys):
    assert fill_tables.main([config(folder, rows, page)]) == 2
    assert complaint in capsys.readouterr().err


def test_a_file_without_results_is_refused(folder, capsys):
    (folder / "r.json").write_text("[]")
    assert fill_tables.main([config(folder, [])]) == 2
    assert "r.json: no results of a benchmark" in capsys.readouterr().err


def test_the_documents_say_what_the_committed_results_say(monkeypatch):
    monkeypatch.chdir(ROOT)
    known = load_config(fill_tables.FillTablesConfig, ROOT / "configs/tables.yaml")
    assert fill_tables.run(known.model_copy(update={"check": True})) == {"changed": []}
