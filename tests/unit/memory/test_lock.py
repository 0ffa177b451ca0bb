from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from megacontext.errors import MemoryLockedError, MemoryStoreError, ReadOnlyMemoryError
from megacontext.memory import Memory
from megacontext.memory import lock as lock_module
from megacontext.memory.lock import WriterLock

HOLD = """
import sys
from megacontext.memory import Memory
from megacontext.memory import lock as lock_module
memory = Memory.open(sys.argv[1], "a")
print("open", flush=True)
sys.stdin.read()
"""


def hold(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "open\n"
    return process


def test_a_second_process_is_told_who_writes_and_may_still_read(make):
    feeder = make()
    feeder.append(9)
    path = feeder.memory.path
    feeder.memory.close()
    with hold(path) as process:
        with pytest.raises(MemoryLockedError) as caught:
            Memory.open(path, "a")
        assert f"process {process.pid} on host {socket.gethostname()} since 2" in str(caught.value)
        with Memory.open(path) as reader:
            feeder.check(reader)
        process.stdin.close()
    Memory.open(path, "a").close()


def test_the_lock_of_a_killed_process_is_taken_over(make):
    path = make().memory.path
    Memory.open(path).close()
    make("other.mctx").memory.close()
    with pytest.raises(MemoryLockedError, match=f"process {os.getpid()} "):
        Memory.open(path, "a")
    other = path.with_name("other.mctx")
    with hold(other) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads((other / "lock").read_text())["pid"] == process.pid
        with Memory.open(other, "a"):
            assert json.loads((other / "lock").read_text())["pid"] == os.getpid()


def test_of_many_that_want_a_stale_lock_one_gets_it(make):
    memory = make().memory
    memory.close()
    with hold(memory.path) as process:
        process.kill()
    told, tell = os.pipe()
    wait, go = os.pipe()
    children = []
    for _ in range(8):
        if not (child := os.fork()):
            os.close(go)
            os.read(wait, 1)
            try:
                WriterLock.acquire(memory.path)
                os.write(tell, b"1")
                signal.pause()
            except MemoryLockedError:
                os.write(tell, b"0")
            finally:
                os._exit(0)
        children.append(child)
    os.close(wait)
    os.close(go)
    answers = b"".join(os.read(told, 1) for _ in children)
    with pytest.raises(MemoryLockedError, match="process"):
        WriterLock.acquire(memory.path)
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    os.close(told)
    os.close(tell)
    assert sorted(answers) == sorted(b"00000001")
    WriterLock.acquire(memory.path).release()


def test_an_unreadable_owner_does_not_hide_the_lock(tmp_path):
    lock = WriterLock.acquire(tmp_path)
    for content in (
        "",
        "{}",
        "[1]",
        '{"pid": "x", "host": 1, "started": 1e999}',
        "\xff",
        "[" * 4000,
    ):
        lock.path.write_text(content)
        with pytest.raises(MemoryLockedError, match="another process"):
            WriterLock.acquire(tmp_path)
    lock.release()
    lock.release()
    WriterLock.acquire(tmp_path).release()


@pytest.mark.parametrize(
    ("number", "error"), [(errno.EROFS, ReadOnlyMemoryError), (errno.EIO, MemoryStoreError)]
)
def test_a_lock_file_that_cannot_be_made_says_why(tmp_path, monkeypatch, number, error):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(error, match="lock"):
        WriterLock.acquire(tmp_path)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_lock_of_a_memory_that_has_just_gone_is_no_use(make, tmp_path, monkeypatch, replaced):
    path, other = make().memory.path, make("other.mctx").memory.path
    (path / "lock").unlink()
    real = lock_module._lock

    def too_late(descriptor, lock_path):
        path.rename(tmp_path / "old")
        if replaced:
            other.rename(path)
        real(descriptor, lock_path)

    monkeypatch.setattr(lock_module, "_lock", too_late)
    with pytest.raises(MemoryLockedError, match="try again"):
        WriterLock.acquire(path)
    monkeypatch.undo()
    WriterLock.acquire(tmp_path / "old").release()
