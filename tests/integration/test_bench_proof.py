"""``bench proof`` as typed, by the command and by the tool, and the page made from its results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import CommandLine, Done
from tiny_models import save_tiny_model

from tools import bench, poc_results

STORY = "1 Mary moved to the bathroom.\n2 John went to the hall.\n3 Where is Mary? \tbathroom\t1\n"
RIVALS = ["window", "megacontext"]
FACTS = {
    "suite", "commit", "model", "seed", "command", "results", "setup", "rivals", "tasks",
    "lengths", "prose_length", "commits", "scores", "prose", "refused",
}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> list[str]:
    """A random model, one story, a short corpus, and a cell of each kind."""
    folder = tmp_path_factory.mktemp("proof")
    save_tiny_model(folder / "model", max_positions=384)
    (folder / "qa1_some-name_test.txt").write_text(STORY)
    held_out = " ".join(f"The {i}th of them came home." for i in range(60))
    (folder / "corpus.txt").write_text(f"{held_out}<|endoftext|>Something else.")
    return [
        f"model={folder / 'model'}", f"babi={folder}", f"corpus=[{folder / 'corpus.txt'}]",
        "held_out_every=2", f"rivals={','.join(RIVALS)}", "lengths=900", "babilong=qa1",
        "ruler=niah_single", "wording=plain", "recall=planted", "facts=3", "questions=1",
        "depths=0.5", "depth_questions=1", "prose=1k", "prose_points=2",
        "habits.engine.budget=384", "habits.engine.tail_tokens=32",
    ]  # fmt: skip


def run_tool(capsys, *arguments: object) -> Done:
    """``python -m tools.bench …`` in this process."""
    capsys.readouterr()
    return Done(bench.main([str(argument) for argument in arguments]), *capsys.readouterr())


def test_the_tool_measures_and_reports_and_the_command_goes_on(
    settings, tmp_path, capsys, megacontext: CommandLine
):
    file, work, report = tmp_path / "proof.json", tmp_path / "work", tmp_path / "report"
    options = ["proof", "--quick", "--set", *settings, f"work={work}"]
    done = run_tool(capsys, *options, "--report", report, "--json", file)
    assert done.status == 0, done.err
    line = json.loads(file.read_text())
    assert line == done.result
    assert set(line) == FACTS
    assert line["command"].startswith("megacontext bench proof --quick --set model=")
    names = {result["name"] for result in line["results"]}
    assert {"ruler.niah_single.900", "prose_nll_gain.1k", "lead.recall.900.window"} <= names
    assert "babilong.qa1.900" in done.err.replace("\n", "")
    assert "babilong.qa1.900.window" not in done.err.replace("\n", "")
    written = {path.name for path in report.iterdir()}
    assert written == {"proof.md", "accuracy.svg", "nll.svg", "time.svg", "depth.svg"}
    kept = (work / "proof.jsonl").read_bytes()
    again = megacontext("bench", *options)
    assert again.result["results"] == line["results"]
    assert (work / "proof.jsonl").read_bytes() == kept
    check_page(file, report / "proof.md", tmp_path / "docs" / "poc_results.md")


def check_page(results: Path, reported: Path, page: Path) -> None:
    """The tool writes the report's page, with pictures in a folder beside it."""
    assert poc_results.main([f"--set=results={results}", "--set", f"output={page}"]) == 0
    assert {path.name for path in page.parent.iterdir()} == {"poc_results.md", "poc_results"}
    text = page.read_text()
    assert "](poc_results/accuracy.svg)" in text
    assert text.replace("](poc_results/", "](") == reported.read_text()


def test_what_cannot_be_asked_is_one_line(settings, megacontext: CommandLine, tmp_path):
    for wrong, complaint in (
        ("rivals=pigeon", "unknown rival 'pigeon'"),
        ("babi=nowhere", "nowhere: no file qa1_"),
        (f"work={tmp_path / 'file'}", "work="),
    ):
        (tmp_path / "file").touch()
        done = megacontext("bench", "proof", "--set", *settings, wrong, "prose_points=0")
        assert complaint in done.complaint


def test_a_page_of_no_results_is_one_line(tmp_path, capsys):
    assert poc_results.main([f"--set=results={tmp_path / 'none.json'}"]) == 2
    assert "none.json: cannot be read" in capsys.readouterr().err
