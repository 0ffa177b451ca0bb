"""Sums over the catalog's rows and over its lexical index: kept by commits, compared by verify."""

from __future__ import annotations

import shutil

import pytest

from megacontext.errors import CorruptMemoryError, InputError, MemoryVersionError
from megacontext.memory import Memory, Source
from megacontext.memory.acknowledgement import NAME
from megacontext.memory.catalog import Catalog
from megacontext.memory.index_sum import _varints, count_terms
from megacontext.memory.rebuild import GistBatch
from megacontext.memory.row_sum import count_rows, row_hash

TEXTS = ["The cats sat", "on two mats", "", "a cat a cat a cat", "Ünïted fjords"] * 3


def sums(memory: Memory) -> tuple[str, str]:
    execute = memory._catalog._connection.execute
    found = dict(execute("SELECT key, value FROM meta").fetchall())
    return found["row_sum"], found["index_sum"]


def counted(memory: Memory) -> tuple[str, str]:
    connection = memory._catalog._connection
    return count_rows(connection), count_terms(connection)


def make_gists(level, children):
    count = {1: 22, 2: 5, 3: 1}[level]
    vectors = children(0, 4 * count).float().reshape(count, -1)[:, :3] % 7
    yield GistBatch(vectors, vectors[:, :2])


def test_every_kind_of_commit_keeps_the_sums(make):
    feeder = make()
    memory = feeder.memory
    assert sums(memory) == counted(memory)
    source = memory.begin_source(Source("a", created=5, tags=("x", "ü")))
    feeder.append(9, source_id=source, block_texts=TEXTS[:2])
    feeder.append(10, source_id=source, block_texts=TEXTS[2:4])
    feeder.append(1)
    assert sums(memory) == counted(memory)
    feeder.append(69, block_texts=[*TEXTS, "more", "words"])
    assert sums(memory) == counted(memory)
    memory.replace_gists(make_gists, gist_version="gist-2")
    assert sums(memory) == counted(memory)
    assert memory.verify().ok
    # FTS5 merges its segments as it likes; what is in them stays.
    memory._catalog._connection.execute("INSERT INTO blocks(blocks) VALUES ('optimize')")
    assert sums(memory) == counted(memory)
    assert memory.verify().ok


def test_the_index_sum_does_not_depend_on_how_the_text_was_cut_into_commits(make):
    texts = [TEXTS[i % 5] + f" n{i}" for i in range(20)]
    found = set()
    for name, sizes in (("a", (80,)), ("b", (4, 36, 40)), ("c", (12, 12, 12, 44))):
        feeder, done = make(f"{name}.mctx"), 0
        for size in sizes:
            feeder.append(size, block_texts=texts[done : done + size // 4])
            done += size // 4
        found.add(sums(feeder.memory)[1])
    assert len(found) == 1


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE sources SET uri = 'b'", "rows"),
        ("UPDATE sources SET author = x''", "rows"),
        ("UPDATE sources SET ingested_at = ingested_at + 1", "rows"),
        ("UPDATE commits SET committed_at = 0", "rows"),
        ("DELETE FROM sources", "rows"),
        ("UPDATE meta SET value = 'x' WHERE key = 'tokenizer_hash'", "rows"),
        ("UPDATE meta SET value = 1 WHERE key = 'row_sum'", "row_sum"),
        ("DELETE FROM meta WHERE key = 'index_sum'", "index_sum"),
        ("INSERT INTO meta VALUES ('more', '1')", "rows"),
        ("INSERT INTO blocks (rowid, text) VALUES (99, 'cat')", "what was committed"),
        ("UPDATE blocks_docsize SET sz = x'09' WHERE id = 1", "lengths"),
        ("DELETE FROM blocks_docsize WHERE id = 1", "lengths"),
        ("UPDATE blocks_data SET block = x'0303' WHERE id = 1", "totals"),
        ("DROP INDEX sources_by_start", "schema"),
        ("CREATE TABLE more (x)", "schema"),
        ("PRAGMA user_version = 3", "user_version"),
    ],
)
def test_every_change_of_the_catalog_is_told(make, statement, expected):
    feeder = make()
    source = feeder.memory.begin_source(Source("a"))
    feeder.append(60, source_id=source, block_texts=TEXTS)
    path = feeder.memory.path
    feeder.memory.close()
    catalog = Catalog.open(path, writable=True)
    catalog._connection.execute(statement)
    catalog.close()
    assert expected in " ".join(str(problem) for problem in Memory.verify_path(path).problems)


def test_a_term_that_a_search_would_miss_is_told(make):
    feeder = make()
    feeder.append(4000, block_texts=[f"word{i} " * 5 for i in range(1000)])
    path = feeder.memory.path
    feeder.memory.close()
    catalog = Catalog.open(path, writable=True)
    execute = catalog._connection.execute
    assert execute("SELECT count(*) FROM blocks_idx").fetchone()[0] > 2
    # Reading from end to end does not need the pages' first terms; finding one term does.
    execute("UPDATE blocks_idx SET pgno = pgno + 2 WHERE pgno > 3")
    catalog.close()
    told = [str(problem) for problem in Memory.verify_path(path).problems]
    assert "does not find its term" in told[0]
    assert told[-1].endswith("more of the kind")


def test_hashes_tell_types_and_tables_apart():
    rows = [("a", 1), ("a", 1.0), ("a", "1"), ("a", b"1"), ("a", None), ("a", b""), ("a", "")]
    hashes = {row_hash(table, row) for table in ("meta", "files") for row in rows}
    assert len(hashes) == 2 * len(rows)


def test_variable_length_integers_are_read_as_sqlite_writes_them():
    assert _varints(b"\x05\x81\x00", 2) == [5, 128]
    assert _varints(b"\xff" * 9, 1) == [2**64 - 1]
    for raw in (b"", b"\x81", b"\x05\x05", None, "5"):
        assert _varints(raw, 1) == [-1]


def old_format(path) -> None:
    """Takes away what version 1 did not have."""
    catalog = Catalog.open(path, writable=True)
    execute = catalog._connection.execute
    execute("DELETE FROM meta WHERE key IN ('row_sum', 'index_sum')")
    execute("UPDATE meta SET value = '1' WHERE key = 'format_version'")
    catalog.close()
    (path / NAME).unlink()


def test_a_memory_of_version_1_is_read_and_brought_up_to_date_by_a_writer(make):
    feeder = make()
    source = feeder.memory.begin_source(Source("a"))
    feeder.append(60, source_id=source, block_texts=TEXTS)
    path = feeder.memory.path
    expected = sums(feeder.memory)
    feeder.memory.close()
    old_format(path)
    with Memory.open(path) as memory:
        feeder.check(memory)
        assert memory.verify().ok
        assert memory._snapshot.row_sum == ""
    for _ in range(2):
        with Memory.open(path, "a") as memory:
            feeder.check(memory)
            assert sums(memory) == counted(memory) == expected
            assert memory.verify().ok
    assert Memory.verify_path(path).ok


def test_an_upgrade_that_is_cut_off_leaves_version_1(make, monkeypatch, tmp_path):
    feeder = make()
    feeder.append(60, block_texts=TEXTS)
    path = feeder.memory.path
    feeder.memory.close()
    old_format(path)
    shutil.copytree(path, tmp_path / "old.mctx")
    monkeypatch.setattr("megacontext.memory.catalog.count_rows", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Memory.open(path, "a")
    monkeypatch.undo()
    with Memory.open(path) as memory:
        assert memory._snapshot.row_sum == ""
    with Memory.open(path, "a") as memory:
        feeder.check(memory)


@pytest.mark.parametrize("version", ["0", "3", "99", "x", "", "٢", "1_0"])
def test_another_version_is_refused(make, version):
    memory = make().memory
    memory.close()
    path = memory.path
    catalog = Catalog.open(path, writable=True)
    catalog._connection.execute(
        "UPDATE meta SET value = ? WHERE key = 'format_version'", (version,)
    )
    catalog.close()
    with pytest.raises((MemoryVersionError, CorruptMemoryError)):
        Memory.open(path)


@pytest.mark.parametrize(
    "source",
    [
        Source("\ud800"),
        Source("a", author="\udcff"),
        Source("a", tags=("b", "\udcff")),
        Source("a", created=float("nan")),
        Source("a", created=float("inf")),
    ],
    ids=range(5),
)
def test_a_source_that_no_catalog_can_hold_is_refused_and_nothing_changes(make, source):
    feeder = make()
    with pytest.raises(InputError, match="source") as caught:
        feeder.memory.begin_source(source)
    assert "\n" not in str(caught.value)
    feeder.append(9)
    feeder.check()
