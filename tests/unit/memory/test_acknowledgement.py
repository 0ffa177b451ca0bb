from __future__ import annotations

import errno
import os
import shutil
import sqlite3

import pytest

from megacontext.errors import CorruptMemoryError, StorageFullError
from megacontext.memory import Memory
from megacontext.memory.acknowledgement import NAME, Acknowledgement
from megacontext.memory.catalog_rows import Chunk

NOTE = Acknowledgement(7, 100, "ab" * 16, Chunk(96, 4, 0xFFFFFFFF))
NEXT = Acknowledgement(8, 101, "cd" * 16, Chunk(96, 5, 1))


def test_a_note_is_read_back(tmp_path):
    assert Acknowledgement.read(tmp_path) is None
    empty = Acknowledgement(0, 0, "00" * 16, None)
    for note in (empty, NOTE, NEXT):
        note.write(tmp_path)
        assert Acknowledgement.read(tmp_path) == note
    assert (tmp_path / NAME).stat().st_mode & 0o777 == 0o600


def test_every_changed_byte_leaves_one_of_two_notes_and_no_third(tmp_path):
    NOTE.write(tmp_path)
    NEXT.write(tmp_path)
    raw = (tmp_path / NAME).read_bytes()
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << place % 8
        (tmp_path / NAME).write_bytes(changed)
        assert Acknowledgement.read(tmp_path) in (NOTE, NEXT)
    for length in range(len(raw)):
        (tmp_path / NAME).write_bytes(raw[:length])
        if length < len(NEXT._pack()):
            with pytest.raises(CorruptMemoryError, match=NAME):
                Acknowledgement.read(tmp_path)
        else:
            assert Acknowledgement.read(tmp_path) == NEXT


def test_a_write_that_is_cut_off_leaves_the_note_before(tmp_path, monkeypatch):
    NOTE.write(tmp_path)
    real = os.pwrite

    def half(descriptor, data, offset):
        real(descriptor, bytes(data)[: len(data) // 2], offset)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(StorageFullError, match=NAME):
        NEXT.write(tmp_path)
    assert Acknowledgement.read(tmp_path) == NOTE


def test_every_commit_is_noted(make):
    feeder = make()
    path = feeder.memory.path
    for n_tokens in (0, 9, 40):
        if n_tokens:
            feeder.append(n_tokens)
        note = Acknowledgement.read(path)
        assert note == Acknowledgement.of(feeder.memory._snapshot)
    assert (note.generation, note.n_tokens) == (2, 49)
    assert note.tail == Chunk(0, 49, note.tail.crc32)


def test_a_catalog_that_is_older_than_the_note_is_refused(make, tmp_path):
    feeder = make()
    feeder.append(9)
    path = feeder.memory.path
    feeder.memory.close()
    shutil.copy(path / "catalog.sqlite", tmp_path / "old")
    with Memory.open(path, "a") as memory:
        memory.append(**feeder.batch(10))
    shutil.copy(tmp_path / "old", path / "catalog.sqlite")
    for mode in ("r", "a"):
        with pytest.raises(CorruptMemoryError, match="commit 2 with 19 tokens was acknowledged"):
            Memory.open(path, mode)
    assert "acknowledged" in str(Memory.verify_path(path).problems[0])
    (path / NAME).unlink()
    with Memory.open(path) as memory:
        assert memory.n_tokens == 9


def test_a_catalog_of_another_memory_with_as_many_commits_is_refused(make):
    feeder, other = make(), make("other.mctx")
    other.seed = 1
    for memory in (feeder, other):
        memory.append(9)
        memory.memory.close()
    shutil.copy(other.memory.path / "catalog.sqlite", feeder.memory.path / "catalog.sqlite")
    with pytest.raises(CorruptMemoryError, match="not the one that was acknowledged"):
        Memory.open(feeder.memory.path)


def test_a_log_that_lost_a_commit_is_no_torn_append(make, tmp_path):
    """SQLite itself ignores a damaged log from the damage on, and says nothing."""
    feeder = make()
    feeder.append(9)
    feeder.append(10)
    copy = tmp_path / "copy.mctx"
    shutil.copytree(feeder.memory.path, copy)
    log = copy / "catalog.sqlite-wal"
    raw = bytearray(log.read_bytes())
    raw[-1] ^= 1
    log.write_bytes(raw)
    connection = sqlite3.connect(copy / "catalog.sqlite")
    assert connection.execute("SELECT max(generation) FROM commits").fetchone() == (1,)
    connection.close()
    with pytest.raises(CorruptMemoryError, match="its log is damaged or missing"):
        Memory.open(copy)


def test_a_missing_note_is_told_and_made_again(make):
    feeder = make()
    feeder.append(9)
    path = feeder.memory.path
    feeder.memory.close()
    (path / NAME).unlink()
    assert [str(problem) for problem in Memory.verify_path(path).problems] == [
        "acknowledged: the file is missing"
    ]
    (path / NAME).write_bytes(b"x" * 300)
    assert "no note" in str(Memory.verify_path(path).problems[0])
    Memory.open(path).close()
    Memory.open(path, "a").close()
    assert Memory.verify_path(path).ok
