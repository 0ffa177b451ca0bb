from __future__ import annotations

import os
import stat

import pytest
import torch

from megacontext.errors import (
    CorruptMemoryError,
    InputError,
    InvariantError,
    MemoryExistsError,
    MemoryMismatchError,
    MemoryNotFoundError,
    MemoryStoreError,
    MemoryVersionError,
    ReadOnlyMemoryError,
)
from megacontext.memory import Memory, Source
from megacontext.memory.catalog import Catalog


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
@pytest.mark.parametrize("key_width", [0, 2])
def test_everything_comes_back_on_every_level(make, dtype, key_width):
    feeder = make(gist_dtype=dtype, key_width=key_width)
    spans = [feeder.append(n) for n in (1, 2, 1, 12, 0, 3, 300, 61)]
    assert spans[:3] == [(0, 1), (1, 3), (3, 4)]
    assert spans[4] == (16, 16)
    assert feeder.memory.n_levels == 5
    feeder.check()
    feeder.memory.close()
    with Memory.open(feeder.memory.path, expect=feeder.memory.identity) as again:
        feeder.check(again)
        assert again.generation == 7


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8"])
def test_single_gists_are_those_of_the_whole_level(make, dtype):
    feeder = make(gist_dtype=dtype)
    feeder.append(40)
    index = torch.tensor([7, 0, 7])
    found = feeder.memory.gists_at(1, index)
    assert found.dtype == torch.float32
    assert torch.equal(found, feeder.memory.gists(1)[index].float())
    assert feeder.memory.gists_at(2, index[:0]).shape == (0, 3)
    for level, wrong in ((1, 10), (1, -1), (0, 0), (4, 0)):
        with pytest.raises(InputError, match="no such gists"):
            feeder.memory.gists_at(level, torch.tensor([wrong]))


def test_single_tokens_are_those_of_the_history(make):
    feeder = make()
    feeder.append(40)
    index = torch.tensor([39, 0, 39, 7])
    found = feeder.memory.tokens_at(index)
    assert found.dtype == torch.int32
    assert torch.equal(found, feeder.memory.tokens()[index])
    assert feeder.memory.tokens_at(index[:0]).shape == (0,)
    for wrong in (40, -1):
        with pytest.raises(InputError, match="no such tokens"):
            feeder.memory.tokens_at(torch.tensor([wrong]))


def test_sizes_are_those_of_the_files(make):
    feeder = make(gist_dtype="int8")
    feeder.append(40)
    memory = feeder.memory
    stats = memory.stats()
    sizes = {path.name: path.stat().st_size for path in memory.path.glob("*.ctx")}
    names = {"gists": "", "keys": "keys.", "fidelity": "fidelity."}
    levels = {
        f"{kind}.L{level}": sizes[f"{names[kind]}L{level}.ctx"]
        for kind in names
        for level in (1, 2)
    }
    assert stats["level_bytes"] == levels
    assert stats["bytes"]["tokens"] == sizes["L0.ctx"]
    for kind in names:
        assert stats["bytes"][kind] == levels[f"{kind}.L1"] + levels[f"{kind}.L2"]
    assert stats["bytes"]["gists"] == 2 * 64 + 12 * (2 + 3)
    assert stats["bytes_per_token"] == sum(stats["bytes"].values()) / 40


def test_an_empty_memory_has_one_level_and_empty_views(make):
    memory = make().memory
    assert (memory.n_tokens, memory.n_levels, memory.generation) == (0, 1, 0)
    assert memory.tokens().shape == (0,)
    assert memory.gists(1).shape == (0, 3)
    assert memory.keys(3).shape == (0, 2)
    assert memory.fidelity(1).shape == (0,)
    assert memory.sources() == []
    assert memory.stats()["bytes_per_token"] == 0


def test_views_share_memory_and_outlive_growth_and_closing(make):
    feeder = make()
    feeder.append(40)
    tokens, gists = feeder.memory.tokens(8, 16), feeder.memory.gists(1, 2, 4)
    assert tokens.data_ptr() == feeder.memory.tokens(0, 40).data_ptr() + 8 * 4
    assert gists.data_ptr() == feeder.memory.gists(1).data_ptr() + 2 * 3 * 2
    feeder.append(400)
    feeder.memory.close()
    assert torch.equal(tokens, feeder.tokens[8:16].to(torch.int32))
    assert torch.equal(gists, feeder.gists[1][2:4])


def test_fidelity_is_nan_where_it_was_not_given(make):
    feeder = make()
    feeder.append(16, fidelity=None)
    feeder.append(16, fidelity={1: torch.tensor([0.5, 0.25, 1.0, float("nan")])})
    assert torch.equal(
        feeder.memory.fidelity(1, 4, 7), torch.tensor([0.5, 0.25, 1.0], dtype=torch.float32)
    )
    assert feeder.memory.fidelity(1)[:4].isnan().all()
    assert feeder.memory.fidelity(2).isnan().all()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"gists": {}}, InvariantError),
        ({"gists": {1: torch.zeros(3, 3), 2: torch.zeros(1, 3)}}, InvariantError),
        ({"gists": {1: torch.zeros(4, 5), 2: torch.zeros(1, 3)}}, InvariantError),
        (
            {"gists": {1: torch.zeros(4, 3, dtype=torch.int64), 2: torch.zeros(1, 3)}},
            InvariantError,
        ),
        (
            {"gists": {1: torch.zeros(4, 3), 2: torch.zeros(1, 3), 3: torch.zeros(1, 3)}},
            InvariantError,
        ),
        ({"gists": {1: torch.full((4, 3), 1e6), 2: torch.zeros(1, 3)}}, InputError),
        ({"gists": {1: torch.full((4, 3), torch.nan), 2: torch.zeros(1, 3)}}, InputError),
        ({"keys": {}}, InvariantError),
        ({"keys": {1: torch.zeros(3, 2), 2: torch.zeros(1, 2)}}, InvariantError),
        ({"fidelity": {1: torch.zeros(3)}}, InvariantError),
        ({"fidelity": {3: torch.zeros(1)}}, InvariantError),
        ({"fidelity": {1: torch.full((4,), torch.inf)}}, InputError),
        ({"block_texts": ["one"]}, InvariantError),
        ({"source_id": 17}, InputError),
        ({"tokens": torch.full((16,), -1)}, InputError),
        ({"tokens": torch.full((16,), 2**31)}, InputError),
        ({"tokens": torch.zeros(16)}, InputError),
        ({"tokens": torch.zeros(4, 4, dtype=torch.int64)}, InputError),
    ],
)
def test_an_append_that_does_not_fit_changes_nothing(make, change, error):
    feeder = make()
    feeder.append(16)
    with pytest.raises(error):
        feeder.memory.append(**{**feeder.batch(16), **change})
    feeder.check()
    feeder.append(16)
    feeder.check()
    assert feeder.memory.verify().ok


def test_keys_for_a_memory_without_keys_are_refused(make):
    feeder = make(key_width=0)
    with pytest.raises(InvariantError, match="key_width"):
        feeder.memory.append(**{**feeder.batch(4), "keys": {1: torch.zeros(1, 2)}})
    with pytest.raises(InputError, match="key_width"):
        feeder.memory.keys(1)


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.tokens(0, 18),
        lambda m: m.tokens(-1, 2),
        lambda m: m.gists(1, 3, 5),
        lambda m: m.gists(0),
        lambda m: m.gists(3, 0, 1),
        lambda m: m.gists(3, 1, 1),
        lambda m: m.keys(0),
        lambda m: m.fidelity(1, 0, 9),
        lambda m: m.count(-1),
        lambda m: m.source_at(17),
        lambda m: m.source_at(-1),
        lambda m: m.search_blocks("x", -1),
    ],
)
def test_reads_outside_the_memory_are_refused(make, read):
    feeder = make()
    feeder.append(17)
    with pytest.raises(InputError):
        read(feeder.memory)


def test_sources_extend_while_their_tokens_are_the_newest(make):
    feeder = make()
    memory = feeder.memory
    source = Source("file:a", "text/x", "00ff", "me", 12.5, ("t1", "t 2"))
    first = memory.begin_source(source)
    unused = memory.begin_source(Source("file:unused"))
    assert memory.sources() == []
    feeder.append(5, source_id=first)
    feeder.append(6, source_id=first)
    feeder.append(2)
    second = memory.begin_source(Source("file:b"))
    feeder.append(3, source_id=second)
    with pytest.raises(InvariantError, match="begin a new source"):
        feeder.append(1, source_id=first)
    assert len({first, unused, second}) == 3
    memory.close()
    with Memory.open(memory.path, "a") as again:
        records = again.sources()
        assert [(r.id, r.uri, r.start, r.end) for r in records] == [
            (first, "file:a", 0, 11),
            (second, "file:b", 13, 16),
        ]
        assert records[0].tags == source.tags
        assert (records[0].created, records[0].author) == (12.5, "me")
        assert records[0].ingested_at > 0
        found = [again.source_at(token) for token in range(16)]
        assert [r.id if r else None for r in found] == [first] * 11 + [None] * 2 + [second] * 3
        feeder.memory = again
        feeder.append(4, source_id=second)
        assert again.sources()[1].end == 20
        assert again.begin_source(Source("c")) > second


def test_readers_see_the_last_commit_after_refresh(make):
    feeder = make()
    feeder.append(10, block_texts=["red apple", "green pear"])
    reader = Memory.open(feeder.memory.path)
    old = reader.tokens()
    source = feeder.memory.begin_source(Source("later"))
    feeder.append(70, block_texts=["red plum"] * 18, source_id=source)
    assert reader.n_tokens == 10
    assert reader.sources() == []
    assert reader.search_blocks("red", 9)[0].tolist() == [0]
    with pytest.raises(InputError):
        reader.tokens(0, 11)
    assert reader.refresh() is True
    assert reader.refresh() is False
    feeder.check(reader)
    assert len(reader.sources()) == 1
    assert reader.search_blocks("red", 99)[0].shape == (19,)
    assert torch.equal(old, reader.tokens(0, 10))
    assert feeder.memory.refresh() is False
    reader.close()


def test_a_torn_append_is_ignored_by_readers_and_cut_by_the_next_writer(make):
    feeder = make()
    feeder.append(70)
    path = feeder.memory.path
    feeder.memory.close()
    sizes = {file.name: file.stat().st_size for file in path.glob("*.ctx")}
    for number, file in enumerate(sorted(path.glob("*.ctx"))):
        with file.open("ab") as raw:
            raw.write(b"junk!" * (number + 1))
    (path / "L9.ctx").write_bytes(b"never committed")
    with Memory.open(path) as reader:
        feeder.check(reader)
        assert reader.verify().ok
    assert (path / "L9.ctx").exists()
    with Memory.open(path, "a") as writer:
        assert {file.name: file.stat().st_size for file in path.glob("*.ctx")} == sizes
        feeder.memory = writer
        feeder.append(33)
        feeder.check()
        assert writer.verify().ok


def test_files_and_directory_are_private(make):
    feeder = make()
    feeder.append(20)
    path = feeder.memory.path
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for file in path.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file.name


def test_creating_over_anything_is_refused(make, tmp_path, identity):
    path = make().memory.path
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for taken in (path, tmp_path / "file", tmp_path / "empty"):
        with pytest.raises(MemoryExistsError, match=taken.name):
            Memory.create(taken, identity)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "m.mctx"]


def test_opening_nothing_says_so(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "none", tmp_path, tmp_path / "file"):
        with pytest.raises(MemoryNotFoundError, match=path.name):
            Memory.open(path)
    with pytest.raises(InputError):
        Memory.open(tmp_path, "w")


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"gist_version": "gist-2"}, "megacontext regist"),
        ({"gist_width": 5, "key_width": 7, "gist_dtype": "bf16"}, "megacontext regist"),
        ({"tokenizer_hash": "tok-2"}, "new memory"),
        ({"tokenizer_hash": "tok-2", "gist_version": "gist-2"}, "new memory"),
        ({"block_size": 8}, "make a new one"),
        ({"base_model": "other"}, "make a new one"),
    ],
)
def test_a_mismatch_names_fields_values_and_the_way_out(make, change, advice):
    from dataclasses import replace

    memory = make().memory
    memory.close()
    wanted = replace(memory.identity, **change)
    with pytest.raises(MemoryMismatchError) as caught:
        Memory.open(memory.path, "a", expect=wanted)
    message = str(caught.value)
    assert advice in message
    assert "\n" not in message
    for name, value in change.items():
        assert f"{name} is {getattr(memory.identity, name)!r}, expected {value!r}" in message
    Memory.open(memory.path, "a").close()


def test_a_newer_format_is_refused(make):
    memory = make().memory
    memory.close()
    catalog = Catalog.open(memory.path, writable=True)
    catalog._connection.execute("UPDATE meta SET value = '3' WHERE key = 'format_version'")
    catalog.close()
    with pytest.raises(MemoryVersionError, match="format 3"):
        Memory.open(memory.path)


def test_writing_through_a_reader_is_refused(make):
    feeder = make()
    batch = feeder.batch(4)
    with Memory.open(feeder.memory.path) as reader:
        assert not reader.writable
        with pytest.raises(ReadOnlyMemoryError):
            reader.append(**batch)
        with pytest.raises(ReadOnlyMemoryError):
            reader.begin_source(Source("x"))


def test_a_directory_without_write_permission_is_read_only(make, monkeypatch):
    memory = make().memory
    memory.close()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ReadOnlyMemoryError, match="mode 'r'"):
        Memory.open(memory.path, "a")
    Memory.open(memory.path).close()


def test_a_closed_memory_says_so(make):
    feeder = make()
    feeder.append(4)
    feeder.memory.close()
    feeder.memory.close()
    for use in (
        lambda m: m.tokens(),
        lambda m: m.search_blocks("x", 1),
        lambda m: m.refresh(),
        lambda m: m.verify(),
        lambda m: m.begin_source(Source("x")),
    ):
        with pytest.raises(MemoryStoreError, match="closed"):
            use(feeder.memory)


@pytest.mark.parametrize("name", ["L0.ctx", "L1.ctx", "keys.L1.ctx", "fidelity.L2.ctx"])
@pytest.mark.parametrize("damage", ["short", "header", "tail", "missing", "other"])
def test_damage_is_found_at_opening_and_located(make, name, damage):
    feeder = make()
    feeder.append(33)
    path = feeder.memory.path / name
    feeder.memory.close()
    raw = bytearray(path.read_bytes())
    if damage == "short":
        path.write_bytes(raw[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "other":
        path.write_bytes((path.parent / "L2.ctx").read_bytes().ljust(len(raw), b"\0"))
    else:
        raw[5 if damage == "header" else -1] ^= 4
        path.write_bytes(raw)
    for mode in ("r", "a"):
        with pytest.raises(CorruptMemoryError) as caught:
            Memory.open(path.parent, mode)
        assert caught.value.path.name == name
        if damage != "missing":
            assert caught.value.offset is not None
        if damage in ("short", "tail"):
            assert caught.value.level == int(name[-5])
            assert caught.value.index is not None
    report = Memory.verify_path(path.parent)
    assert [problem.path.name for problem in report.problems] == [name]


def test_a_catalog_that_is_missing_or_no_database_is_corrupt(make):
    feeder = make()
    feeder.append(8)
    path = feeder.memory.path
    feeder.memory.close()
    catalog = path / "catalog.sqlite"
    raw = catalog.read_bytes()
    catalog.write_bytes(b"nonsense" * 1000)
    with pytest.raises(CorruptMemoryError):
        Memory.open(path)
    catalog.write_bytes(raw[:4096] + b"\xaa" * (len(raw) - 4096))
    with pytest.raises(CorruptMemoryError):
        Memory.open(path)
    catalog.unlink()
    with pytest.raises(CorruptMemoryError, match="missing"):
        Memory.open(path)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("UPDATE files SET name = '../L0.ctx' WHERE level = 0", "odd file"),
        ("UPDATE files SET length = length - 1 WHERE level = 0", "chunks end"),
        ("UPDATE commits SET n_tokens = 4 WHERE generation = 1", "tokens make"),
        ("DELETE FROM meta WHERE key = 'block_size'", "identity"),
        ("UPDATE meta SET value = '1' WHERE key = 'block_size'", "identity"),
        ("DELETE FROM meta WHERE key = 'format_version'", "format version"),
    ],
)
def test_a_catalog_that_contradicts_itself_is_corrupt(make, statement, expected):
    feeder = make()
    feeder.append(8)
    path = feeder.memory.path
    feeder.memory.close()
    catalog = Catalog.open(path, writable=True)
    catalog._connection.execute(statement)
    catalog.close()
    with pytest.raises(CorruptMemoryError, match=expected):
        Memory.open(path, "a")


def test_stats_account_for_every_byte(make):
    feeder = make()
    feeder.append(100)
    stats = feeder.memory.stats()
    assert stats["tokens"] == 100
    assert stats["levels"] == [100, 25, 6, 1]
    for kind, pattern in (("tokens", "L0.ctx"), ("gists", "L[1-9].ctx"), ("keys", "keys.*")):
        sizes = [file.stat().st_size for file in feeder.memory.path.glob(pattern)]
        assert stats["bytes"][kind] == sum(sizes)
    assert stats["bytes_per_token"] == sum(stats["bytes"].values()) / 100
