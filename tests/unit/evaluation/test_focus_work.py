from __future__ import annotations

import pytest

from megacontext.errors import InputError
from megacontext.evaluation.focus_work import FinishedWork


def test_what_was_added_is_known_to_the_next_run(tmp_path):
    folder = tmp_path / "a" / "work"
    work = FinishedWork(folder)
    assert "x" not in work
    work.add("x", {"right": True, "answer": "Käse\n"})
    work.add("y", [1.5, None])
    again = FinishedWork(folder)
    assert again["x"] == {"right": True, "answer": "Käse\n"}
    assert again["y"] == [1.5, None]


def test_a_line_that_was_cut_short_is_measured_again(tmp_path):
    FinishedWork(tmp_path).add("x", 1)
    with (tmp_path / "focus.jsonl").open("a") as file:
        file.write('{"key": "y", "resu')
    work = FinishedWork(tmp_path)
    assert "x" in work
    assert "y" not in work
    work.add("z", 3)
    assert FinishedWork(tmp_path)["z"] == 3


def test_without_a_folder_results_are_kept_for_this_run():
    work = FinishedWork(None)
    work.add("x", 1)
    assert work["x"] == 1


@pytest.mark.parametrize("content", ["no json\n", "[1]\n", '{"key": "x"}\n'])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "focus.jsonl").write_text(content)
    with pytest.raises(InputError, match=r"focus\.jsonl"):
        FinishedWork(tmp_path)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="work="):
        FinishedWork(tmp_path / "file" / "work")
