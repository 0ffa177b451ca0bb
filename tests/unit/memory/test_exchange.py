from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megacontext.errors import MemoryExistsError, MemoryStoreError
from megacontext.memory import Memory
from megacontext.memory import exchange as module
from megacontext.memory.exchange import aside, come_back, remove_memory, take_place


@pytest.fixture
def two(make) -> tuple[Path, Path]:
    """A new memory of 9 tokens and an old one of 20, both closed."""
    paths = []
    for name, n_tokens in (("new.mctx", 9), ("m.mctx", 20)):
        feeder = make(name)
        feeder.append(n_tokens)
        feeder.memory.close()
        paths.append(feeder.memory.path)
    return paths[0], paths[1]


@pytest.fixture
def no_exchange(monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(module, "_exchange", unsupported)


def tokens(path: Path) -> int:
    with Memory.open(path) as memory:
        assert memory.verify().ok
        return memory.n_tokens


def test_two_memories_change_places_in_one_step(two, monkeypatch):
    new, path = two
    monkeypatch.setattr(Path, "rename", None)
    take_place(new, path)
    assert (tokens(new), tokens(path)) == (20, 9)
    assert not aside(path).exists()


def test_in_two_steps_where_the_file_system_cannot(two, no_exchange):
    new, path = two
    take_place(new, path)
    assert (tokens(path), tokens(aside(path))) == (9, 20)
    assert not new.exists()
    come_back(path)
    assert tokens(path) == 9


@pytest.mark.parametrize("step", [1, 2])
def test_two_steps_that_fail_or_are_cut_off_change_nothing(two, no_exchange, monkeypatch, step):
    new, path = two
    real, calls = Path.rename, []
    for error in (OSError(errno.EIO, "broken"), KeyboardInterrupt()):
        calls.clear()

        def rename(self, target, error=error):
            calls.append(target)
            if len(calls) == step:
                raise error
            return real(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        with pytest.raises((MemoryStoreError, KeyboardInterrupt)):
            take_place(new, path)
        assert (tokens(new), tokens(path)) == (9, 20)
        assert not aside(path).exists()


def test_a_crash_between_the_two_steps_is_mended(two):
    _, path = two
    path.rename(aside(path))
    come_back(path)
    assert tokens(path) == 20
    come_back(path)
    assert tokens(path) == 20


def test_another_failure_is_told(two, tmp_path):
    new, path = two
    with pytest.raises(MemoryStoreError, match="cannot replace"):
        take_place(tmp_path / "nothing", path)
    assert (tokens(new), tokens(path)) == (9, 20)


def test_what_a_memory_left_is_removed_and_nothing_else(two, tmp_path):
    new, path = two
    (path / "L1.ctx").unlink()
    assert remove_memory(path)
    assert not remove_memory(path)
    (new / "letter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(new)
    for other in (new, tmp_path / "file", tmp_path / "link"):
        with pytest.raises(MemoryExistsError, match="move it elsewhere"):
            remove_memory(other)
    assert (new / "letter.txt").read_text() == "mine"
    assert tokens(new) == 9


def test_a_system_without_the_call_says_so(monkeypatch):
    class Library:
        """Has no such function."""

    monkeypatch.setattr(module.ctypes, "CDLL", lambda *_, **__: Library())
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)) as caught:
        module._exchange(Path("/a"), Path("/b"))
    assert caught.value.errno in module._UNSUPPORTED
