"""Searches of lens keys: all of them, and by inverted lists that are stored with the memory."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys

import pytest
import torch

from megacontext.errors import InputError
from megacontext.memory import KeyIndex, KeyIndexConfig, Memory, key_index
from megacontext.memory.exchange import remove_memory
from megacontext.memory.key_index_file import INDEX_NAME, load_lists
from megacontext.memory.key_lists import KeyLists, find_faiss, list_count
from megacontext.memory.rebuild import GistBatch

WIDTH = 8
ALL = KeyIndexConfig(flat_keys=16, rerank=1 << 20)

needs_faiss = pytest.mark.skipif(find_faiss() is None, reason="the extra `ann` is not installed")


@pytest.fixture
def feed(make):
    """A memory with so many keys."""

    def build(n_keys=300, **changes):
        feeder = make(key_width=WIDTH, **changes)
        feeder.append(4 * n_keys)
        return feeder

    return build


def queries(seed=0, count=3):
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


def late(asked):
    return lambda keys: (asked @ keys.float().T).amax(dim=0)


def search(index, k=5, n=None, seed=0):
    asked = queries(seed)
    n = index.memory.count(1) if n is None else n
    return index.search(asked, k, n, late(asked))


def expected(memory, k=5, n=None, seed=0):
    found = late(queries(seed))(memory.keys(1, 0, n))
    best = found.topk(min(k, len(found)))
    return best.indices, best.values


def agrees(memory, index, k=5, n=None, seeds=range(4)):
    for seed in seeds:
        blocks, value = search(index, k, n, seed)
        wanted, best = expected(memory, k, n, seed)
        torch.testing.assert_close(value, best)
        assert blocks.tolist() == wanted.tolist()
    return True


def stored(memory):
    return (memory.path / INDEX_NAME).read_bytes()


def index_files(memory):
    return [file.name for file in memory.path.iterdir() if "faiss" in file.name]


def untrained(*_):
    raise AssertionError("the lists were made anew")


# Without an index.


def test_without_faiss_all_keys_are_compared(feed, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(key_index, "KEYS_PER_CHUNK", 37)
    memory = feed().memory
    index = KeyIndex(memory, ALL)
    assert agrees(memory, index)
    assert agrees(memory, index, k=40, n=123)
    index.update()
    assert not (memory.path / INDEX_NAME).exists()


def test_keys_are_read_in_bounded_chunks(feed, monkeypatch):
    monkeypatch.setattr(key_index, "KEYS_PER_CHUNK", 16)
    memory = feed(100).memory
    asked, sizes = queries(), []

    def relevance(keys):
        sizes.append(len(keys))
        return late(asked)(keys)

    blocks, _ = KeyIndex(memory).search(asked, 5, 100, relevance)
    assert sizes == [16] * 6 + [4]
    assert blocks.tolist() == expected(memory)[0].tolist()


def test_of_equal_keys_the_newest_are_found(feed, monkeypatch):
    monkeypatch.setattr(key_index, "KEYS_PER_CHUNK", 16)
    memory = feed(50).memory
    levels = torch.zeros(50)
    levels[[3, 20]] = 1.0
    seen = []

    def relevance(keys):
        seen.append(len(keys))
        return levels[sum(seen[:-1]) : sum(seen)]

    blocks, value = KeyIndex(memory).search(queries(), 5, 50, relevance)
    assert blocks.tolist() == [20, 3, 49, 48, 47]
    assert value.tolist() == [1, 1, 0, 0, 0]


def test_up_to_the_limit_there_is_no_index(feed):
    memory = feed(300).memory
    index = KeyIndex(memory, KeyIndexConfig(flat_keys=300))
    assert agrees(memory, index)
    index.update()
    assert not (memory.path / INDEX_NAME).exists()
    assert memory.stats()["bytes"]["key_index"] == 0


@pytest.mark.parametrize(("k", "n", "count"), [(0, 300, 0), (5, 0, 0), (5, 3, 3), (400, 300, 300)])
@pytest.mark.parametrize("flat_keys", [16, 1000])
def test_as_many_as_there_are(feed, k, n, count, flat_keys):
    memory = feed().memory
    blocks, value = search(KeyIndex(memory, KeyIndexConfig(flat_keys=flat_keys)), k, n)
    assert len(blocks) == len(value) == count
    assert blocks.dtype == torch.int64


def test_what_does_not_fit_is_refused(feed):
    index = KeyIndex(feed(10).memory)
    asked = queries()
    for bad in (asked[0], asked[:, :3]):
        with pytest.raises(InputError, match=r"expected \[q, 8\]"):
            index.search(bad, 5, 10, late(asked))
    with pytest.raises(InputError, match="k -1"):
        index.search(asked, -1, 10, late(asked))
    with pytest.raises(InputError, match="no 11 keys to search; there are 10"):
        index.search(asked, 5, 11, late(asked))


def test_a_memory_without_keys_is_left_alone(make):
    feeder = make(key_width=0)
    feeder.append(100)
    KeyIndex(feeder.memory, ALL).update()
    assert feeder.memory.keys_file is None
    assert not (feeder.memory.path / INDEX_NAME).exists()


def test_a_stamp_tells_keys_apart(make, feed):
    one, again, more = feed(), feed(name="b.mctx"), feed(name="c.mctx", gist_version="other")
    other = make("d.mctx", key_width=WIDTH)
    other.seed = 1
    other.append(1200)
    stamp = one.memory.key_stamp(250)
    assert stamp == again.memory.key_stamp(250)
    assert stamp not in {feeder.memory.key_stamp(250) for feeder in (more, other)}
    assert stamp != one.memory.key_stamp(251)
    one.append(400)
    assert one.memory.key_stamp(250) == stamp


def test_a_stamp_takes_full_chunks_from_the_catalog(feed, monkeypatch):
    for module in ("file_set", "reading"):
        monkeypatch.setattr(f"megacontext.memory.{module}.CHUNK_BYTES", 64 * 2 * WIDTH)
    feeder = feed(100)
    feeder.append(4 * 100)
    memory, read = feeder.memory, []
    keys = Memory.keys
    monkeypatch.setattr(
        Memory, "keys", lambda self, level, a, b: read.append((a, b)) or keys(self, level, a, b)
    )
    stamp = memory.key_stamp(150)
    assert read == [(128, 150)]
    monkeypatch.setattr(memory._catalog, "chunks", lambda _: [])
    assert memory.key_stamp(150) == stamp, "the same from the keys themselves"


# With one.


@needs_faiss
@pytest.mark.parametrize("codes", ["pq4", "fp16"])
def test_looking_everywhere_finds_the_best(feed, codes):
    memory = feed().memory
    index = KeyIndex(memory, ALL.model_copy(update={"codes": codes}))
    assert agrees(memory, index)
    assert agrees(memory, index, k=300)
    assert stat.S_IMODE((memory.path / INDEX_NAME).stat().st_mode) == 0o600
    assert memory.stats()["bytes"]["key_index"] == len(stored(memory))
    assert memory.verify().ok
    assert index_files(memory) == [INDEX_NAME]


@needs_faiss
@pytest.mark.parametrize(
    "how",
    [
        {"codes": "fp16", "rerank": 16, "probe_share": 0.25},
        {"codes": "pq4", "rerank": 200, "probe_share": 0.25},
        {"codes": "pq4", "rerank": 200},
    ],
    ids=["fp16, some lists", "pq4, some lists", "pq4"],
)
def test_little_work_finds_most_of_the_best(make, how):
    feeder = make(key_width=WIDTH)
    centres = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(5))
    batch = feeder.batch(4 * 4000)
    place = torch.randint(64, (4000,), generator=torch.Generator().manual_seed(6))
    batch["keys"][1] = (centres[place] + 0.1 * batch["keys"][1].float()).half()
    feeder.memory.append(**batch)
    index = KeyIndex(feeder.memory, KeyIndexConfig(flat_keys=100, **how))
    assert list_count(4000) == 16
    hits = 0
    for query in range(20):
        asked = centres[query, None]
        blocks, _ = index.search(asked, 16, 4000, late(asked))
        best = late(asked)(feeder.memory.keys(1)).topk(16).indices
        hits += int(torch.isin(blocks, best).sum())
    assert hits / (16 * 20) > 0.95


@needs_faiss
def test_newer_keys_than_those_searched_are_not_found(feed):
    memory = feed().memory
    index = KeyIndex(memory, ALL)
    index.update()
    for n in (1, 17, 299):
        assert agrees(memory, index, n=n)


@needs_faiss
def test_new_keys_are_compared_until_they_are_many(feed, monkeypatch):
    feeder = feed(300)
    memory = feeder.memory
    index = KeyIndex(memory, ALL.model_copy(update={"flat_share": 0.1}))
    assert agrees(memory, index)
    first = stored(memory)
    monkeypatch.setattr(KeyLists, "train", untrained)
    feeder.append(4 * 30)
    assert agrees(memory, index)
    assert stored(memory) == first, "30 of 300 are a tenth"
    feeder.append(4)
    assert agrees(memory, index)
    assert stored(memory) != first
    assert index._lists.covered == 331
    assert memory.verify().ok


@needs_faiss
def test_lists_are_made_anew_when_there_are_too_few(feed):
    feeder = feed(40)
    index = KeyIndex(feeder.memory, ALL.model_copy(update={"growth": 4.0}))
    index.update()
    counts = []
    for _ in range(3):
        feeder.append(4 * 60)
        assert agrees(feeder.memory, index)
        counts.append((index._lists.trained_on, index._lists.lists))
    assert counts == [(40, 2), (160, 4), (160, 4)]


@needs_faiss
def test_a_new_process_goes_on_with_what_is_stored(feed, monkeypatch):
    feeder = feed()
    KeyIndex(feeder.memory, ALL).update()
    feeder.memory.close()
    monkeypatch.setattr(KeyLists, "train", untrained)
    for mode in ("r", "a"):
        with Memory.open(feeder.memory.path, mode) as memory:
            index = KeyIndex(memory, ALL)
            assert agrees(memory, index)
            assert index._lists.covered == 300


@needs_faiss
def test_the_same_keys_give_the_same_file(feed):
    memory = feed().memory
    KeyIndex(memory, ALL).update()
    first = stored(memory)
    (memory.path / INDEX_NAME).unlink()
    index = KeyIndex(memory, ALL)
    assert agrees(memory, index)
    assert stored(memory) == first


@needs_faiss
def test_every_changed_byte_is_noticed(feed, tmp_path):
    memory = feed(20).memory
    KeyIndex(memory, ALL).update()
    raw, faiss = stored(memory), find_faiss()
    stamps = {20: memory.key_stamp(20)}
    assert load_lists(memory.path, faiss, 1, stamps.get).covered == 20
    damaged = [raw[:length] for length in range(0, len(raw), 13)] + [raw + b"\0"]
    for place, byte in enumerate(raw):
        damaged.append(raw[:place] + bytes([byte ^ 1 << place % 8]) + raw[place + 1 :])
    for bad in damaged:
        (tmp_path / INDEX_NAME).write_bytes(bad)
        assert load_lists(tmp_path, faiss, 1, stamps.get) is None


@needs_faiss
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "directory", "lost"])
def test_what_is_damaged_is_made_anew(feed, damage):
    memory = feed().memory
    KeyIndex(memory, ALL).update()
    raw, path = stored(memory), memory.path / INDEX_NAME
    if damage in ("directory", "lost"):
        path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage != "lost":
        flipped = raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:]
        path.write_bytes({"flip": flipped, "cut": raw[: len(raw) // 2], "empty": b""}[damage])
    assert agrees(memory, KeyIndex(memory, ALL))
    if damage == "directory":
        assert path.is_dir(), "what is no index is not removed"
        path.rmdir()
    else:
        assert stored(memory) == raw
    assert memory.verify().ok


@needs_faiss
def test_an_index_of_other_codes_is_made_anew(feed):
    memory = feed().memory
    KeyIndex(memory, ALL.model_copy(update={"codes": "fp16"})).update()
    exact = stored(memory)
    assert agrees(memory, KeyIndex(memory, ALL))
    assert len(stored(memory)) < len(exact)


@needs_faiss
def test_an_index_of_other_keys_is_not_used(feed, make):
    memory = feed().memory
    other = make("other.mctx", key_width=WIDTH)
    other.seed = 7
    other.append(1200)
    KeyIndex(other.memory, ALL).update()
    shutil.copy(other.memory.path / INDEX_NAME, memory.path)
    foreign = stored(memory)
    assert agrees(memory, KeyIndex(memory, ALL))
    assert stored(memory) != foreign


@needs_faiss
def test_an_index_of_more_keys_than_a_reader_sees_waits(feed):
    feeder = feed()
    with Memory.open(feeder.memory.path) as reader:
        feeder.append(400)
        KeyIndex(feeder.memory, ALL).update()
        index = KeyIndex(reader, ALL)
        assert agrees(reader, index)
        assert index._lists is None
        assert reader.refresh()
        assert agrees(reader, index)
        assert index._lists.covered == 400


@needs_faiss
def test_new_gists_take_the_index_with_them(feed):
    memory = feed().memory
    index = KeyIndex(memory, ALL)
    index.update()
    old = stored(memory)
    count = iter(range(2, 9))

    def make_gists(level, _):
        number = memory.count(level)
        generator = torch.Generator().manual_seed(next(count))
        keys = torch.randn(number, WIDTH, generator=generator)
        yield GistBatch(torch.zeros(number, 3), keys)

    memory.replace_gists(make_gists, gist_version=memory.identity.gist_version)
    assert not (memory.path / INDEX_NAME).exists()
    (memory.path / INDEX_NAME).write_bytes(old)
    assert agrees(memory, index)
    assert stored(memory) != old


@needs_faiss
def test_a_reader_stores_nothing(feed):
    feeder = feed()
    feeder.memory.close()
    with Memory.open(feeder.memory.path) as memory:
        index = KeyIndex(memory, ALL.model_copy(update={"reader_searches": 2}))
        index.update()
        lists = []
        for seed in range(4):
            assert agrees(memory, index, seeds=[seed])
            lists.append(index._lists is not None)
        assert lists == [False, False, True, True]
        assert not index_files(memory)


@needs_faiss
def test_a_reader_takes_what_a_writer_has_stored_meanwhile(feed, monkeypatch):
    feeder = feed()
    written = KeyIndex(feeder.memory, ALL)
    written.update()
    with Memory.open(feeder.memory.path) as reader:
        index = KeyIndex(reader, ALL)
        assert agrees(reader, index)
        feeder.append(400)
        written.update()
        reader.refresh()
        monkeypatch.setattr(KeyLists, "add", untrained)
        assert agrees(reader, index)
        assert index._lists.covered == 400


@needs_faiss
def test_a_full_disk_stops_no_search(feed, monkeypatch):
    memory = feed().memory
    index = KeyIndex(memory, ALL)

    def full(_):
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr("megacontext.memory.key_index_file.os.fsync", full)
        assert agrees(memory, index)
        assert not index_files(memory)
    assert index._lists.covered == 300


@needs_faiss
def test_a_full_disk_is_told_through_faiss(feed, monkeypatch):
    memory = feed().memory
    opened = os.fdopen

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, piece):
            raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr("megacontext.memory.key_index_file.os.fdopen", lambda *a: Full(opened(*a)))
        assert agrees(memory, KeyIndex(memory, ALL))
    assert not (memory.path / INDEX_NAME).exists()


@needs_faiss
def test_a_draft_that_was_cut_off_is_in_nobodys_way(feed):
    memory = feed().memory
    draft = memory.path / f"{INDEX_NAME}.new"
    draft.write_bytes(b"half")
    assert memory.verify().ok
    KeyIndex(memory, ALL).update()
    assert not draft.exists()
    draft.write_bytes(b"half")
    memory.close()
    assert remove_memory(memory.path)


@needs_faiss
def test_numbers_beyond_float16_are_ranked_still(feed):
    feeder = feed(40, gist_dtype="bf16")
    batch = feeder.batch(4 * 40)
    batch["keys"][1][7] = 1e30
    feeder.memory.append(**batch)
    index = KeyIndex(feeder.memory, ALL)
    asked = torch.ones(1, WIDTH)
    blocks, value = index.search(asked, 3, 80, late(asked))
    assert int(blocks[0]) == 47
    assert float(value[0]) == pytest.approx(8e30, rel=0.01)


@needs_faiss
def test_threads_of_faiss_are_given_back(feed):
    faiss = find_faiss()
    before = faiss.omp_get_max_threads()
    memory = feed().memory
    index = KeyIndex(memory, ALL.model_copy(update={"threads": 3}))
    assert agrees(memory, index)
    assert faiss.omp_get_max_threads() == before
