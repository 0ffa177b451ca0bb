from __future__ import annotations

import pytest

from megacontext.errors import InputError
from megacontext.evaluation.proof_records import Record, Records


def record(number=0, rival="window", setup="a", **measured):
    return Record(setup=setup, cell="c", rival=rival, number=number, seed=0, commit="x", **measured)


def test_what_was_kept_is_read_back(tmp_path):
    folder = tmp_path / "deep" / "work"
    kept = [record(0, score=1.0, written="a\nb\u2028ü"), record(1, refused="too long")]
    Records(folder).add(kept)
    assert list(Records(folder).of("c", "window", "a").values()) == kept
    assert Records(folder).of("c", "window", "other") == {}
    assert Records(folder).of("c", "bm25", "a") == {}


def test_the_later_line_counts(tmp_path):
    records = Records(tmp_path)
    records.add([record(score=0.0)])
    records.add([record(score=1.0)])
    assert Records(tmp_path).of("c", "window", "a")[0].score == 1.0


def test_a_line_that_was_cut_short_is_dropped_and_written_over(tmp_path):
    Records(tmp_path).add([record(number) for number in range(3)])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    records = Records(tmp_path)
    assert list(records.of("c", "window", "a")) == [0, 1]
    records.add([record(2, score=0.5)])
    assert Records(tmp_path).of("c", "window", "a")[2].score == 0.5


def test_a_line_may_be_cut_within_a_character(tmp_path):
    Records(tmp_path).add([record(0), record(1, written="ü")])
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[: content.index("ü".encode()) + 1])
    assert list(Records(tmp_path).of("c", "window", "a")) == [0]


def test_the_first_line_cut_short_leaves_nothing(tmp_path):
    Records(tmp_path).add([record()])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert Records(tmp_path).of("c", "window", "a") == {}
    assert file.read_bytes() == b""


@pytest.mark.parametrize("line", ['{"key": 1}', "text", '{"setup": "a", "number": "x"}'])
def test_a_file_of_something_else_is_refused(tmp_path, line):
    Records(tmp_path).add([record()])
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InputError, match="line 2"):
        Records(tmp_path)


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="work="):
        Records(tmp_path / "file")


def test_without_a_folder_records_stay_in_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = Records(None)
    records.add([record()])
    assert list(records.of("c", "window", "a")) == [0]
    assert not list(tmp_path.iterdir())
