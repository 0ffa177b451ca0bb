"""A memory without some of its sources is what it would be had they never been there."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
from pathlib import Path

import pytest
from engine_cases import contents, learned_gistnet, new_engine, words
from tiny_models import tiny_base_model

from megacontext.errors import (
    CorruptMemoryError,
    InputError,
    MemoryExistsError,
    MemoryLockedError,
    MemoryMismatchError,
    MemoryStoreError,
)
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet, LensNetConfig
from megacontext.memory import Memory, Source
from megacontext.memory import exchange as exchange_module
from megacontext.memory import tree as tree_module
from megacontext.memory.exchange import aside
from megacontext.memory.resident import ResidentLimit
from megacontext.runtime.forget import forget

SECRET = "the zebra sleeps in the blue barn. " * 9
PARTS = (
    ("book", words(1500)),
    ("letter", SECRET),
    (None, words(70, seed=1)),
    ("other", words(333, seed=2)),
    ("letter", words(40, seed=3)),
    ("last", words(1200, seed=4)),
)


def remembering(folder, base, parts=PARTS, **options) -> Path:
    """A memory of these parts, closed."""
    engine = new_engine(folder, base, name=options.pop("name", "m"), **options)
    with engine.memory as memory:
        for uri, text in parts:
            source = None if uri is None else Source(uri, author="Ada", tags=("a",))
            engine.ingestor.ingest(text, source)
    return memory.path


@pytest.fixture
def path(base, tmp_path) -> Path:
    return remembering(tmp_path, base)


def without(uris):
    return [part for part in PARTS if part[0] not in uris]


def everything(path: Path) -> dict:
    with Memory.open(path) as memory:
        assert memory.verify().ok
        placed = [(source.uri, source.start, source.end) for source in memory.sources()]
        return {**contents(memory), "identity": memory.identity, "sources": placed}


def digests(path: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in path.iterdir()
        if file.name != "lock" and "catalog.sqlite-" not in file.name
    }


def mean(base):
    return GistNet.untrained(base.d_model)


@pytest.mark.parametrize("uris", [("letter",), ("book",), ("last", "other"), ("book", "letter")])
def test_the_rest_is_what_a_memory_of_the_rest_is(base, path, tmp_path, uris):
    with Memory.open(path) as memory:
        before = memory.sources()
    steps = []
    done = forget(base, path, uris, mean(base), progress=lambda *step: steps.append(step))
    fresh = everything(remembering(tmp_path, base, without(uris), name="fresh"))
    assert everything(path) == fresh
    assert {source.uri for source in done.sources} == set(uris)
    assert done.n_tokens == len(fresh["tokens"])
    assert steps[-1] == (done.n_tokens, done.n_tokens)
    with Memory.open(path) as memory:
        kept = [source for source in before if source.uri not in uris]
        assert [dataclasses.replace(s, start=0, end=0) for s in memory.sources()] == [
            dataclasses.replace(s, start=0, end=0) for s in kept
        ]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["fresh.mctx", "m.mctx"]


def test_learned_gists_and_keys_tell_nothing_of_what_stood_before_them(base, tmp_path):
    net = learned_gistnet(base)
    lens = LensNet(
        LensNetConfig(d_model=base.d_model, gist_width=net.config.gist_width, key_vocabulary=258)
    ).eval()
    path = remembering(tmp_path, base, gistnet=net, lens=lens)
    forget(base, path, ["letter"], net, lens)
    rest = without(["letter"])
    fresh = remembering(tmp_path, base, rest, name="fresh", gistnet=net, lens=lens)
    assert everything(path) == everything(fresh)
    assert "keys 1" in everything(path)


def test_all_sources_may_go(base, tmp_path):
    path = remembering(tmp_path, base, [("a", words(500)), ("b", words(99))])
    done = forget(base, path, ["b", "a", "b"], mean(base))
    assert (len(done.sources), done.n_tokens) == (2, 0)
    assert everything(path)["tokens"] == []
    with Memory.open(path, "a") as memory:
        assert memory.sources() == []


def test_a_file_may_be_named_by_its_path(base, tmp_path, monkeypatch):
    (tmp_path / "a b.txt").write_text("x")
    uri = (tmp_path / "a b.txt").as_uri()
    path = remembering(tmp_path, base, [(uri, words(99)), ("b", words(50))])
    monkeypatch.chdir(tmp_path)
    assert forget(base, path, ["a b.txt"], mean(base)).sources[0].uri == uri
    assert [source[0] for source in everything(path)["sources"]] == ["b"]


@pytest.mark.parametrize(
    "names", [["nobody"], ["letter", "nobody"], [""], ["a\0b"], ["n" * 5000], ["\udcff"]]
)
def test_an_unknown_source_changes_nothing(base, path, names):
    before = digests(path)
    with pytest.raises(InputError, match=r"no source .*inspect") as caught:
        forget(base, path, names, mean(base))
    assert "\n" not in str(caught.value)
    assert digests(path) == before
    assert [file.name for file in path.parent.iterdir()] == ["m.mctx"]


def test_what_cannot_be_done_changes_nothing(base, path, tmp_path):
    before = digests(path)
    with pytest.raises(MemoryMismatchError, match="regist"):
        forget(base, path, ["letter"], learned_gistnet(base))
    with pytest.raises(MemoryMismatchError, match="base_model"):
        forget(tiny_base_model("llama", max_positions=256), path, ["letter"], mean(base))
    with Memory.open(path, "a"), pytest.raises(MemoryLockedError, match="open for writing by"):
        forget(base, path, ["letter"], mean(base))
    path.with_name("m.mctx.forgetting").mkdir()
    letter = path.with_name("m.mctx.forgetting") / "letter.txt"
    letter.write_text("mine")
    with pytest.raises(MemoryExistsError, match="move it elsewhere"):
        forget(base, path, ["letter"], mean(base))
    assert letter.read_text() == "mine"
    assert digests(path) == before
    for nowhere in (Path("/"), tmp_path / "loop"):
        if nowhere.name:
            nowhere.symlink_to(nowhere)
        with pytest.raises((InputError, MemoryStoreError)):
            forget(base, nowhere, ["letter"], mean(base))


def test_a_file_that_is_no_part_of_the_memory_is_not_removed_with_it(base, path):
    (path / "keys.L1.faiss").write_text("an index over keys is a part")
    (path / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match=r"letter\.txt: no part of the memory"):
        forget(base, path, ["letter"], mean(base))
    assert (path / "letter.txt").read_text() == "mine"
    (path / "letter.txt").unlink()
    assert len(forget(base, path, ["letter"], mean(base)).sources) == 2
    assert [file.name for file in path.parent.iterdir()] == ["m.mctx"]
    assert not (path / "keys.L1.faiss").exists()


def test_a_damaged_memory_must_be_repaired_first(base, path):
    raw = bytearray((path / "L1.ctx").read_bytes())
    raw[99] ^= 1
    (path / "L1.ctx").write_bytes(raw)
    before = digests(path)
    with pytest.raises(CorruptMemoryError, match="repair"):
        forget(base, path, ["letter"], mean(base))
    assert digests(path) == before


def test_copies_that_a_repair_has_kept_are_told(base, path):
    kept = [path.with_name(f"m.mctx{end}") for end in (".damaged", ".damaged2", ".repaired")]
    for copy in kept:
        copy.mkdir()
    path.with_name("n.mctx.damaged").mkdir()
    assert forget(base, path, ["letter"], mean(base)).copies == tuple(kept)


def test_a_link_to_a_memory_stays_one(base, path, tmp_path):
    link = tmp_path / "elsewhere"
    link.symlink_to(path)
    forget(base, link, ["letter"], mean(base))
    assert link.is_symlink()
    assert everything(link) == everything(path)
    assert "letter" not in [source[0] for source in everything(path)["sources"]]


def test_a_reader_keeps_what_it_sees_until_it_is_closed(base, path):
    reader = Memory.open(path)
    before = contents(reader)
    forget(base, path, ["letter"], mean(base))
    assert not reader.refresh()
    assert contents(reader) == before
    reader.close()
    assert everything(path) != before


def test_nobody_writes_while_the_old_memory_is_removed(base, path, monkeypatch):
    real = exchange_module.shutil.rmtree

    def rmtree(*args, **options):
        with pytest.raises(MemoryLockedError):
            Memory.open(path, "a")
        real(*args, **options)

    monkeypatch.setattr(exchange_module.shutil, "rmtree", rmtree)
    forget(base, path, ["letter"], mean(base))
    Memory.open(path, "a").close()


@pytest.mark.parametrize("supported", [True, False])
def test_an_old_memory_that_cannot_be_removed_is_told_and_goes_next_time(
    base, path, monkeypatch, supported
):
    if not supported:
        monkeypatch.setattr(exchange_module, "_exchange", unsupported)
    with monkeypatch.context() as patch:
        patch.setattr(exchange_module.shutil, "rmtree", broken)
        with pytest.raises(MemoryStoreError, match="cannot remove"):
            forget(base, path, ["letter"], mean(base))
    after = everything(path)
    assert "letter" not in [source[0] for source in after["sources"]]
    assert len(list(path.parent.iterdir())) == 2
    done = forget(base, path, ["letter"], mean(base))
    assert (done.sources, done.n_tokens) == ((), len(after["tokens"]))
    assert [file.name for file in path.parent.iterdir()] == ["m.mctx"]
    with pytest.raises(InputError, match="no source"):
        forget(base, path, ["letter"], mean(base))


def test_a_memory_that_is_gone_from_its_place_comes_back(base, path):
    """What a crash leaves between the two steps of a file system that cannot exchange names."""
    path.rename(aside(path))
    with Memory.open(aside(path), "a"), pytest.raises(MemoryLockedError):
        forget(base, path, ["letter"], mean(base))
    assert len(forget(base, path, ["letter"], mean(base)).sources) == 2
    assert [file.name for file in path.parent.iterdir()] == ["m.mctx"]


def test_a_limit_to_what_stays_in_ram_is_that_of_both_memories(base, path, monkeypatch):
    announced = []

    class Watched(ResidentLimit):
        def announce(self, mapped, start, stop):
            announced.append((id(self), self.n_bytes))
            super().announce(mapped, start, stop)

    monkeypatch.setattr(tree_module, "ResidentLimit", Watched)
    before = digests(path)
    with pytest.raises(InputError, match="resident_mb is 1; allowed are 16"):
        forget(base, path, ["letter"], mean(base), resident_mb=1)
    assert digests(path) == before
    forget(base, path, ["letter"], mean(base), resident_mb=16)
    assert len({limit for limit, _ in announced}) == 2
    assert {n_bytes for _, n_bytes in announced} == {16 << 20}


def test_an_interruption_while_the_new_memory_grows_leaves_the_old_one(base, path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    before = digests(path)
    with pytest.raises(KeyboardInterrupt):
        forget(base, path, ["letter"], mean(base), progress=interrupt)
    assert digests(path) == before
    assert [file.name for file in path.parent.iterdir()] == ["m.mctx"]
    Memory.open(path, "a").close()


def unsupported(*_):
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def broken(*_, **__):
    raise OSError(errno.EIO, os.strerror(errno.EIO))
