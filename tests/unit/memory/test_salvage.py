from __future__ import annotations

import shutil

import pytest

from megacontext.errors import CorruptMemoryError, InvariantError
from megacontext.memory import Memory, Source
from megacontext.memory.acknowledgement import NAME
from megacontext.memory.catalog import Catalog
from megacontext.memory.salvage import salvage


@pytest.fixture
def feeder(make):
    """Two commits of one source, one of another; closed."""
    feeder = make()
    first = feeder.memory.begin_source(Source("a", author="Ada"))
    feeder.append(30, source_id=first, block_texts=["pear"] * 7)
    feeder.append(11, source_id=first, block_texts=["fig"] * 3)
    feeder.append(9, source_id=feeder.memory.begin_source(Source("b", tags=("x",))))
    feeder.sources = feeder.memory.sources()
    feeder.memory.close()
    return feeder


def execute(path, statement: str) -> None:
    catalog = Catalog.open(path, writable=True)
    catalog._connection.execute(statement)
    catalog.close()


def saved(feeder, path=None) -> tuple[int, list, tuple[str, ...]]:
    found = salvage(path or feeder.memory.path)
    try:
        n_tokens = found.tokens.length
        assert found.tokens.map().tolist() == feeder.tokens.tolist()[:n_tokens]
        assert found.identity == feeder.memory.identity
        return n_tokens, list(found.sources), found.doubts
    finally:
        found.tokens.close()


def test_an_undamaged_memory_is_saved_as_it_is(feeder):
    assert saved(feeder) == (50, feeder.sources, ())


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / "L1.ctx").unlink(),
        lambda path: (path / "keys.L2.ctx").write_bytes(b"x" * 999),
        lambda path: (path / NAME).write_bytes(b"x" * 999),
        lambda path: (path / NAME).unlink(),
        lambda path: (path / "lock").write_bytes(b"\xff"),
        lambda path: execute(path, "UPDATE blocks_data SET block = x'00' WHERE id > 1"),
        lambda path: execute(path, "DELETE FROM files WHERE kind = 'gists'"),
    ],
    ids=range(7),
)
def test_what_can_be_made_anew_does_not_matter(feeder, damage):
    damage(feeder.memory.path)
    n_tokens, sources, _ = saved(feeder)
    assert (n_tokens, sources) == (50, feeder.sources)


@pytest.mark.parametrize("place", [0, 63, 64, 64 + 4 * 49])
def test_a_changed_token_file_is_refused_with_the_place(feeder, place):
    file = feeder.memory.path / "L0.ctx"
    raw = bytearray(file.read_bytes())
    raw[place] ^= 4
    file.write_bytes(raw)
    with pytest.raises(CorruptMemoryError, match=r"L0\.ctx \(level 0"):
        salvage(feeder.memory.path)


@pytest.mark.parametrize(
    ("statement", "doubt", "kept"),
    [
        ("UPDATE sources SET author = 'Eve' WHERE id = 1", "sources may be wrong", 2),
        ("UPDATE sources SET tags = '[[' WHERE id = 2", "1 sources cannot be read", 1),
        ("UPDATE sources SET uri = x'ff' WHERE id = 2", "1 sources cannot be read", 1),
        ("UPDATE sources SET start_token = 3 WHERE id = 2", "1 sources cannot be read", 1),
        ("UPDATE sources SET end_token = 1 << 62 WHERE id = 2", "sources may be wrong", 2),
        ("DELETE FROM meta WHERE key = 'row_sum'", "sources may be wrong", 2),
    ],
)
def test_sources_that_cannot_be_vouched_for_are_told(feeder, statement, doubt, kept):
    execute(feeder.memory.path, statement)
    n_tokens, sources, doubts = saved(feeder)
    assert n_tokens == 50
    assert len(sources) == kept
    assert any(doubt in told for told in doubts)
    assert all(0 <= source.start < source.end <= 50 for source in sources)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM files WHERE kind = 'tokens'",
        "DELETE FROM chunks WHERE file_id = 1",
        "UPDATE commits SET n_tokens = 49 WHERE generation = 3",
        "DELETE FROM meta WHERE key = 'block_size'",
        "DROP TABLE chunks",
    ],
)
def test_tokens_that_nothing_proves_are_refused(feeder, statement):
    execute(feeder.memory.path, statement)
    with pytest.raises(CorruptMemoryError):
        salvage(feeder.memory.path)


@pytest.fixture
def lost_log(feeder, tmp_path):
    """A memory whose writer died, and whose log was lost with the last two commits."""
    path = tmp_path / "lost.mctx"
    with Memory.open(feeder.memory.path, "a") as memory:
        feeder.memory = memory
        feeder.append(8)
        feeder.append(7)
        shutil.copytree(memory.path, path)
    (path / "catalog.sqlite-wal").unlink()
    (path / "catalog.sqlite-shm").unlink()
    with pytest.raises(CorruptMemoryError, match="acknowledged"):
        Memory.open(path, "a")
    return path


def test_tokens_behind_a_lost_log_are_saved_by_the_note_of_their_last_chunk(feeder, lost_log):
    n_tokens, sources, doubts = saved(feeder, lost_log)
    assert (n_tokens, sources) == (65, feeder.sources)
    assert doubts == ("sources of tokens 50 to 65 are lost with the catalog's log",)


def test_tokens_behind_a_lost_log_that_changed_are_refused(feeder, lost_log):
    file = lost_log / "L0.ctx"
    raw = bytearray(file.read_bytes())
    raw[64 + 4 * 64] ^= 1
    file.write_bytes(raw)
    with pytest.raises(CorruptMemoryError, match="tokens 50 to 65 were acknowledged"):
        salvage(lost_log)
    (lost_log / NAME).unlink()
    assert saved(feeder, lost_log)[0] == 50


def test_tokens_that_no_noted_chunk_covers_are_refused(feeder, lost_log, monkeypatch, tmp_path):
    monkeypatch.setattr("megacontext.memory.file_set.CHUNK_BYTES", 16)
    other = tmp_path / "short.mctx"
    with Memory.open(feeder.memory.path, "a") as memory:
        memory.append(**feeder.batch(40))
        shutil.copytree(memory.path, other)
    for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
        (other / name).unlink()
    shutil.copy(lost_log / "catalog.sqlite", other / "catalog.sqlite")
    with pytest.raises(CorruptMemoryError, match="no checksum covers them"):
        salvage(other)


def test_sources_are_restored_with_numbers_and_times(feeder, make):
    fresh = make("fresh.mctx")
    fresh.append(50)
    fresh.memory.restore_sources(feeder.sources)
    assert fresh.memory.sources() == feeder.sources
    assert fresh.memory.begin_source(Source("c")) == 3
    assert fresh.memory.verify().ok
    with pytest.raises(InvariantError, match="do not belong"):
        fresh.memory.restore_sources(feeder.sources)


def test_sources_of_tokens_that_are_not_there_are_refused(feeder, make):
    fresh = make("fresh.mctx")
    fresh.append(49)
    with pytest.raises(InvariantError, match="do not belong"):
        fresh.memory.restore_sources(feeder.sources)
    assert fresh.memory.sources() == []
