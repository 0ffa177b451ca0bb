"""Disks that fail: nothing half-written is ever visible, and everything committed stays."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from megacontext.errors import MemoryStoreError, StorageFullError
from megacontext.memory import Memory, Source
from megacontext.memory.catalog import Catalog
from megacontext.memory.ctx_file import CtxFile

CALLS = ("pwrite", "fsync", "open")


class FailingDisk:
    """Lets the first calls through, fails one of them (after a partial write), then works again."""

    def __init__(self, monkeypatch, name: str, fail_at: int, number: int) -> None:
        self.calls = 0
        self.fail_at = fail_at
        self.failed = False
        real = getattr(os, name)
        counting = threading.Lock()  # files are synced at the same time

        def call(*args, **kwargs):
            with counting:
                self.calls += 1
                here = self.calls == fail_at
            if not here:
                return real(*args, **kwargs)
            self.failed = True
            if name == "pwrite":
                real(args[0], bytes(args[1])[: len(args[1]) // 2], args[2])
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EIO, MemoryStoreError),
    ],
)
def test_every_failing_call_of_an_append_is_undone(make, monkeypatch, name, number, error):
    feeder = make()
    feeder.append(60, block_texts=["old"] * 15)
    path = feeder.memory.path
    files = {file.name: file.read_bytes() for file in path.glob("*.ctx")}
    sites = 0
    while True:
        batch = feeder.batch(210)
        source = feeder.memory.begin_source(Source("new"))
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, name, sites + 1, number)
            if disk_holds(feeder.memory, batch, source, disk, error):
                break
        sites += 1
        feeder.check()
        assert {file.name: file.read_bytes() for file in path.glob("*.ctx")} == files
        assert feeder.memory.sources() == []
        assert feeder.memory.search_blocks("new", 9)[0].tolist() == []
        with Memory.open(path) as reader:
            feeder.check(reader)
    assert sites >= {"pwrite": 13, "fsync": 14, "open": 7}[name]
    assert feeder.memory.n_tokens == 270
    assert feeder.memory.search_blocks("new", 99)[0].shape == (52,)
    assert feeder.memory.verify().ok


def disk_holds(memory, batch, source, disk, error) -> bool:
    try:
        memory.append(**batch, block_texts=["new"] * 52, source_id=source)
    except error:
        assert disk.failed
        return False
    # The last call notes the commit; it stands without the note.
    assert not disk.failed or disk.calls == disk.fail_at
    return True


@pytest.mark.parametrize("threads", [0, 1])
def test_every_file_is_synced_where_no_thread_can_be_had(make, monkeypatch, threads):
    feeder = make()
    feeder.append(60, block_texts=["old"] * 15)
    synced, begun, submit, sync = [], [], ThreadPoolExecutor.submit, CtxFile.fsync

    def fsync(file):
        synced.append(file.path.name)
        sync(file)

    def refuse(pool, *work):
        if len(begun) == threads:
            raise RuntimeError("can't start new thread")
        begun.append(work)
        return submit(pool, *work)

    monkeypatch.setattr(CtxFile, "fsync", fsync)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    feeder.append(4, block_texts=["new"])
    grown = {f"{kind}L{level}.ctx" for level in (1, 2, 3) for kind in ("", "fidelity.", "keys.")}
    assert sorted(synced) == sorted(grown | {"L0.ctx"})
    assert len(begun) == threads
    feeder.check()
    assert feeder.memory.verify().ok


@pytest.mark.parametrize("name", CALLS)
def test_a_failed_creation_leaves_nothing_behind(tmp_path, monkeypatch, name, identity):
    sites = 0
    while True:
        with monkeypatch.context() as patch:
            disk = FailingDisk(patch, name, sites + 1, errno.ENOSPC)
            try:
                Memory.create(tmp_path / "m.mctx", identity).close()
            except StorageFullError:
                assert disk.failed
            else:
                break
        sites += 1
        if not (tmp_path / "m.mctx").exists():
            assert list(tmp_path.iterdir()) == []
        else:
            Memory.open(tmp_path / "m.mctx", "a").close()
            (tmp_path / "m.mctx").rename(tmp_path / "moved")
            for file in (tmp_path / "moved").iterdir():
                file.unlink()
            (tmp_path / "moved").rmdir()
    assert sites >= 1


def test_a_full_catalog_is_undone(make):
    feeder = make()
    feeder.append(60)
    connection = feeder.memory._catalog._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    batch = feeder.batch(4000)
    with pytest.raises(StorageFullError, match="catalog"):
        feeder.memory.append(**batch, block_texts=[f"word{i} " * 9 for i in range(1000)])
    feeder.check()
    connection.execute("PRAGMA max_page_count = 100000")
    feeder.append(4000, block_texts=["new"] * 1000)
    feeder.check()
    assert feeder.memory.verify().ok


class BrokenCommit:
    """A connection whose COMMIT fails the way a failing sync does, as often as told."""

    def __init__(self, connection, times: int, *, commits_first: bool = False) -> None:
        self._connection = connection
        self._times = times
        self._commits_first = commits_first

    def __getattr__(self, name):
        return getattr(self._connection, name)

    def execute(self, statement, *args):
        if statement == "COMMIT" and self._times > 0 and self._writes():
            self._times -= 1
            if self._commits_first:
                self._connection.execute(statement)
                raise KeyboardInterrupt
            error = sqlite3.OperationalError("disk I/O error")
            error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
            raise error
        return self._connection.execute(statement, *args)

    def _writes(self) -> bool:
        before = self._connection.execute("SELECT count(*) FROM commits").fetchone()[0]
        reader = sqlite3.connect(self._connection.execute("PRAGMA database_list").fetchone()[2])
        after = reader.execute("SELECT count(*) FROM commits").fetchone()[0]
        rolls = "SELECT value FROM meta WHERE key = 'roll_backs'"
        changed = [c.execute(rolls).fetchone()[0] for c in (self._connection, reader)]
        reader.close()
        return before != after or changed[0] != changed[1]


def test_a_commit_that_fails_is_undone_and_fenced(make):
    feeder = make()
    feeder.append(60)
    catalog = feeder.memory._catalog
    real = catalog._connection
    catalog._connection = BrokenCommit(real, 1)
    with pytest.raises(MemoryStoreError, match="disk I/O error"):
        feeder.memory.append(**feeder.batch(20))
    feeder.check()
    rolled = real.execute("SELECT value FROM meta WHERE key = 'roll_backs'").fetchone()[0]
    assert int(rolled) == 1
    feeder.append(20)
    feeder.check()
    assert feeder.memory.verify().ok


def test_a_commit_of_unknown_outcome_stops_writing_but_loses_nothing(make):
    feeder = make()
    feeder.append(60)
    path = feeder.memory.path
    catalog = feeder.memory._catalog
    real, catalog._connection = catalog._connection, BrokenCommit(catalog._connection, 2)
    with pytest.raises(MemoryStoreError, match="disk I/O error"):
        feeder.memory.append(**feeder.batch(20))
    assert (path / "L0.ctx").stat().st_size == 64 + 80 * 4
    with pytest.raises(MemoryStoreError, match="open it again"):
        feeder.memory.append(**feeder.batch(20))
    feeder.check()
    real.rollback()
    feeder.memory.close()
    with Memory.open(path, "a") as again:
        feeder.check(again)
        assert again.verify().ok


def test_an_interruption_right_after_the_commit_keeps_it(make):
    feeder = make()
    feeder.append(60)
    catalog = feeder.memory._catalog
    catalog._connection = BrokenCommit(catalog._connection, 1, commits_first=True)
    with pytest.raises(KeyboardInterrupt):
        feeder.append(20)
    assert feeder.memory.n_tokens == 80
    assert feeder.memory.verify().ok


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from conftest import Feeder
from megacontext.errors import MemoryStoreError
from megacontext.memory import Memory
memory = Memory.open(sys.argv[1], "a")
feeder = Feeder(memory)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (64 + 4 * 1000 + 2, hard))
try:
    memory.append(**feeder.batch(2000))
except MemoryStoreError as error:
    print(type(error).__name__, memory.n_tokens, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
memory.append(**feeder.batch(2000))
print(memory.n_tokens, memory.verify().ok)
"""


def test_a_file_size_limit_of_the_system_is_survived(make):
    memory = make().memory
    memory.close()
    tests = str(Path(__file__).parent)
    result = subprocess.run(
        [sys.executable, "-c", LIMITED, str(memory.path), tests],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split("\n")[:2] == ["MemoryStoreError 0", "2000 True"]


INGEST = """
import sys
sys.path.insert(0, sys.argv[2])
from conftest import Feeder
from megacontext.memory import Memory
memory = Memory.open(sys.argv[1], "a")
feeder = Feeder(memory)
while True:
    batch = feeder.batch(999)
    blocks = (memory.n_tokens + 999) // 4 - memory.n_tokens // 4
    print(memory.append(**batch, block_texts=["some words"] * blocks)[1], flush=True)
"""


@pytest.mark.parametrize("commits", [1, 4, 9])
def test_a_killed_writer_loses_nothing_it_committed(make, commits):
    feeder = make()
    path = feeder.memory.path
    feeder.memory.close()
    command = [sys.executable, "-c", INGEST, str(path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        reported = [int(process.stdout.readline()) for _ in range(commits)][-1]
        process.kill()
        rest = process.stdout.read().split()
    reported = int(rest[-1]) if rest else reported
    with Memory.open(path, "a") as again:
        assert again.n_tokens in (reported, reported + 999)
        assert again.n_tokens % 999 == 0
        assert again.verify().ok
        assert again.search_blocks("words", 10**6)[0].shape == (again.count(1),)
        feeder.memory = again
        written = [drawn_at(start) for start in range(0, again.n_tokens, 999)]
        assert torch.equal(again.tokens(), torch.cat(written).to(torch.int32))
        again.append(**feeder.batch(50))
        assert again.verify().ok


def drawn_at(start):
    generator = torch.Generator().manual_seed(start)
    return torch.randint(0, 2**31, (999,), generator=generator)


def test_a_catalog_opened_for_reading_only_works_without_its_log(make, monkeypatch):
    feeder = make()
    feeder.append(9, block_texts=["pear", "fig"])
    path = feeder.memory.path
    feeder.memory.close()
    assert not (path / "catalog.sqlite-wal").exists()
    real = sqlite3.connect

    def refuse_shared_memory(target, **options):
        if "mode=ro" in target:
            error = sqlite3.OperationalError("unable to open database file")
            error.sqlite_errorcode = sqlite3.SQLITE_CANTOPEN
            raise error
        return real(target, **options)

    monkeypatch.setattr(sqlite3, "connect", refuse_shared_memory)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with Memory.open(path) as reader:
        feeder.check(reader)
        assert reader.search_blocks("pear", 3)[0].tolist() == [0]


def test_a_rolled_back_catalog_keeps_its_generation(make):
    feeder = make()
    feeder.append(9)
    feeder.memory.close()
    catalog = Catalog.open(feeder.memory.path, writable=True)
    assert catalog.roll_back() == catalog.generation() == 1
    catalog.close()
