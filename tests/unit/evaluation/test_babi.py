from __future__ import annotations

import re

import pytest

from megacontext.errors import DataError
from megacontext.evaluation.babi import find_babi, read_babi

SAMPLE = (
    "1 Mary moved to the bathroom.\n"
    "2 John went to the hallway.\n"
    "3 Where is Mary? \tbathroom\t1\n"
    "4 Mary took the apple there.\n"
    "5 What is Mary carrying?\tapple,milk\t4 1\n"
    "1 Bill is in the park.\n"
    "2 Is Bill in the park? \tyes\t1\n"
)


def write(tmp_path, text, name="qa1_single-supporting-fact_test.txt"):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_stories_questions_and_evidence_are_read(tmp_path):
    first, second, third = read_babi(write(tmp_path, SAMPLE))
    assert first.task == "qa1"
    assert first.story == ("Mary moved to the bathroom.", "John went to the hallway.")
    assert (first.question, first.answer, first.evidence) == ("Where is Mary?", "bathroom", (0,))
    # Questions count in the numbering but are no sentences of the story.
    assert second.story == (*first.story, "Mary took the apple there.")
    assert (second.answer, second.evidence) == ("apple,milk", (2, 0))
    assert third.story == ("Bill is in the park.",)
    assert third.evidence == (0,)


def test_the_prompt_is_story_and_question(tmp_path):
    third = read_babi(write(tmp_path, SAMPLE))[2]
    assert third.prompt == "Bill is in the park.\nQuestion: Is Bill in the park?\nAnswer:"


def test_windows_line_ends_are_read(tmp_path):
    plain = read_babi(write(tmp_path, SAMPLE))
    assert read_babi(write(tmp_path, SAMPLE.replace("\n", "\r\n"))) == plain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 A.\nMary moved.\n", "line 2 does not start with a sentence number"),
        ("1 A.\n\n2 B.\n", "line 2 does not start"),
        ("² A.\n", "line 1 does not start"),
        ("1 A.\n2 Where?\tpark\n", "line 2 has 2 fields, expected 1 or 3"),
        ("1 A.\n2 Where?\tpark\t1\tx\n", "line 2 has 4 fields"),
        ("1 A.\n2 Where?\tpark\tone\n", "line 2 names evidence 'one', expected numbers"),
        ("1 A.\n2 Where?\tpark\t1 7\n", "line 2 names evidence '1 7'"),
        ("1 A.\n2 Where?\tpark\t2\n", "line 2 names evidence '2'"),
    ],
)
def test_what_is_no_babi_is_refused_with_its_line(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=re.escape(f"{path}: {message}")):
        read_babi(path)


def test_unreadable_files_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"missing\.txt: no such file; name a folder"):
        read_babi(tmp_path / "missing.txt")
    (tmp_path / "binary.txt").write_bytes(b"1 \xff\xfe")
    with pytest.raises(DataError, match=r"binary\.txt: cannot be read as UTF-8"):
        read_babi(tmp_path / "binary.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read_babi(tmp_path)


def test_the_file_of_a_task_is_found(tmp_path):
    one = write(tmp_path, SAMPLE)
    write(tmp_path, SAMPLE, "qa10_indefinite-knowledge_test.txt")
    train = write(tmp_path, SAMPLE, "qa1_single-supporting-fact_train.txt")
    assert find_babi(tmp_path, "qa1") == one
    assert find_babi(tmp_path, "qa1", "train") == train
    with pytest.raises(DataError, match=r"no file qa2_\*_test\.txt; get bAbI"):
        find_babi(tmp_path, "qa2")
