from __future__ import annotations

import hashlib
import os

import pytest

from megacontext.errors import InputError
from megacontext.runtime.text_files import FoundFile, PassedOver, check_files, find_files


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "folder"
    for name in ("b.md", "a.txt", "sub/z.md", "sub/deep/y.txt", ".hidden.md", ".git/config"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "picture.bin").write_bytes(b"PNG\0\xff")
    (root / "old.txt").write_bytes(b"caf\xe9")
    (root / "notes.mctx").mkdir()
    (root / "notes.mctx" / "catalog.sqlite").write_bytes(b"SQLite")
    (root / "loop").symlink_to(root)
    (root / "nowhere").symlink_to(root / "none")
    os.mkfifo(root / "pipe")
    return root


def names(files, root):
    return [str(file.path.relative_to(root)) for file in files]


def test_a_folder_gives_its_text_files_in_order(folder):
    found, passed = find_files([folder])
    assert names(found, folder) == [
        "a.txt",
        "b.md",
        "old.txt",
        "picture.bin",
        "sub/deep/y.txt",
        "sub/z.md",
    ]
    assert not any(file.named for file in found)
    reasons = {str(item.path.relative_to(folder)): item.reason for item in passed}
    assert reasons == {
        ".git": "hidden",
        ".hidden.md": "hidden",
        "loop": "a link to a folder",
        "notes.mctx": "a memory",
        "nowhere": "no file",
        "pipe": "no file",
    }
    texts, odd = check_files(found, author="Ada", tags=("t",), readers=3)
    assert names(texts, folder) == ["a.txt", "b.md", "sub/deep/y.txt", "sub/z.md"]
    assert odd == [
        PassedOver(folder / "old.txt", "not UTF-8 text (byte 3)"),
        PassedOver(folder / "picture.bin", "binary"),
    ]
    first = texts[0]
    assert first.source.sha256 == hashlib.sha256(b"a.txt").hexdigest()
    assert first.source.uri == (folder / "a.txt").as_uri()
    assert (first.source.author, first.source.tags, first.size) == ("Ada", ("t",), 5)
    assert texts[1].source.media_type == "text/markdown"
    assert "".join(first.read()) == "a.txt"


def test_patterns_choose_among_what_is_in_folders_only(folder):
    named = folder / ".hidden.md"
    found, _ = find_files([named, folder, folder / "a.txt"], ["*.md", "y.*"])
    assert names(found, folder) == [".hidden.md", "b.md", "sub/deep/y.txt", "sub/z.md", "a.txt"]
    assert [file.named for file in found] == [True, False, False, False, True]


@pytest.mark.parametrize("name", ["picture.bin", "old.txt"])
def test_a_file_that_was_named_must_be_text(folder, name):
    with pytest.raises(InputError, match=f"{name}: not UTF-8 text"):
        check_files([FoundFile(folder / name, named=True)])


def test_zeros_are_text_where_the_file_was_named(tmp_path):
    (tmp_path / "a").write_bytes(b"a\0b")
    (text,), _ = check_files([FoundFile(tmp_path / "a", named=True)])
    assert "".join(text.read()) == "a\0b"
    _, (odd,) = check_files([FoundFile(tmp_path / "a", named=False)])
    assert odd.reason == "binary"


def test_a_file_that_changes_is_told_before_its_end(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes(b"x" * (3 << 20))
    (text,), _ = check_files([FoundFile(path, named=True)])
    with path.open("ab") as file:
        file.write(b"y")
    read: list[str] = []
    with pytest.raises(InputError, match="changed while"):
        read.extend(text.read())
    assert len("".join(read)) <= 3 << 20
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        list(text.read())


def test_an_empty_file_is_text(tmp_path):
    (tmp_path / "a").touch()
    (text,), _ = check_files([FoundFile(tmp_path / "a", named=False)])
    assert list(text.read()) == [""]
