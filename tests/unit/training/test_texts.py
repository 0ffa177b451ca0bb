from __future__ import annotations

import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from megacontext.errors import DataError
from megacontext.tasks import text_streams
from megacontext.training.lm_batches import END_OF_TEXT, read_documents
from megacontext.training.texts import (
    bundled_texts,
    find_texts,
    resolve_text,
    stream_documents,
)

PIECES = st.lists(
    st.sampled_from([END_OF_TEXT, "<|endof", "|>", " ", "\n\n", "word", "é", "a b", "\u3000"])
)


def streamed(path) -> list[str]:
    return ["".join(parts) for parts in stream_documents(path)]


@given(pieces=PIECES, chunk=st.integers(1, 40))
def test_the_stream_gives_the_documents_that_reading_at_once_gives(tmp_path_factory, pieces, chunk):
    path = tmp_path_factory.mktemp("texts") / "corpus.txt"
    path.write_bytes("".join(pieces).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_streams, "_CHUNK_BYTES", chunk)
        assert streamed(path) == read_documents([path])


def test_documents_may_be_passed_over(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(END_OF_TEXT.join(["one", "two", "three"]))
    documents = stream_documents(path)
    next(documents)
    next(documents)
    assert list(next(documents)) == ["three"]


def test_compressed_text_of_several_frames_is_read_whole(tmp_path):
    path = tmp_path / "corpus.txt.zst"
    frames = [zstandard.compress(text.encode()) for text in ("one ", "story" + END_OF_TEXT, "two")]
    path.write_bytes(b"".join(frames))
    assert streamed(path) == read_documents([path]) == ["one story", "two"]


@pytest.mark.parametrize("name", ["empty.txt", "empty.txt.zst"])
def test_an_empty_file_has_no_documents(tmp_path, name):
    (tmp_path / name).touch()
    assert streamed(tmp_path / name) == read_documents([tmp_path / name]) == []


def test_every_byte_is_reported(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("x" * 200_000)
    read: list[int] = []
    for document in stream_documents(path, read.append):
        list(document)
    assert sum(read) == 200_000
    assert len(read) > 1


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b"\xff\xfe", "not .compressed. UTF-8"),
        ("a.txt", "é".encode()[:1], "not .compressed. UTF-8"),
        ("a.txt.zst", b"not zstandard", "not .compressed. UTF-8"),
        ("a.txt.zst", zstandard.compress(b"words " * 99)[:-4], "ends too early"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        streamed(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        streamed(tmp_path / "none.txt")


def test_a_long_document_is_not_held_in_memory(tmp_path):
    path = tmp_path / "corpus.txt"

    def peak(size: int) -> int:
        path.write_text("some words " * (size // 11))
        tracemalloc.start()
        for document in stream_documents(path):
            for _ in document:
                pass
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(8_000_000) < 1.2 * peak(1_000_000)


def test_the_bundled_book_is_found_by_name():
    assert "lilac_fairy_book" in bundled_texts()
    path = resolve_text("bundled:lilac_fairy_book")
    assert sum(map(len, read_documents([path]))) > 100_000
    assert streamed(path) == read_documents([path])


def test_an_unknown_bundled_text_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"bundled:none.*bundled:lilac_fairy_book"):
        resolve_text("bundled:none")


def test_patterns_give_files_in_order(tmp_path):
    for name in ("b.md", "a.md", "c.txt"):
        (tmp_path / name).write_text(name)
    found = find_texts([str(tmp_path / "c.txt"), str(tmp_path / "*.md")])
    assert [text.path.name for text in found] == ["c.txt", "a.md", "b.md"]
    assert found[1].name == (tmp_path / "a.md").as_posix()


def test_patterns_are_relative_to_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("text")
    monkeypatch.chdir(tmp_path)
    assert [text.name for text in find_texts(["docs/*.md"])] == ["docs/a.md"]


@pytest.mark.parametrize("names", [["none.txt"], ["*.none"], ["a.txt", "*.txt"]])
def test_a_corpus_that_cannot_be_meant_is_refused(tmp_path, monkeypatch, names):
    (tmp_path / "a.txt").write_text("text")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such file|no file matches|listed twice"):
        find_texts(names)
