from __future__ import annotations

import errno
import os

import pytest
import torch

from megacontext.errors import InvariantError, MemoryMismatchError, StorageFullError
from megacontext.memory import Memory, Source
from megacontext.memory.rebuild import GistBatch

NEW = {"gist_version": "gist-2", "gist_width": 2, "key_width": 1, "gist_dtype": "bf16"}


def maker(memory, *, batch=3, surplus=0, fail_on=None):
    """New gist: first and last number below it; new key: the level."""
    block = memory.identity.block_size

    def make(level, children):
        for start in range(0, memory.count(level), batch):
            stop = min(start + batch, memory.count(level)) + surplus
            if level == fail_on:
                raise RuntimeError("the model failed")
            below = children(start * block, (stop - surplus) * block).float()
            below = below.reshape(stop - surplus - start, block, -1)
            gists = torch.stack([below[:, 0, 0], below[:, -1, -1]], dim=1) / (2**31)
            gists = torch.cat([gists, gists[:surplus]])
            yield GistBatch(gists, torch.full((len(gists), 1), float(level)))

    return make


def expected(feeder):
    below, levels = feeder.tokens.to(torch.int32).float()[:, None], {}
    for level in range(1, feeder.memory.n_levels):
        below = below[: len(below) // 4 * 4].reshape(-1, 4, below.shape[1])
        below = (torch.stack([below[:, 0, 0], below[:, -1, -1]], 1) / 2**31).to(torch.bfloat16)
        levels[level] = below
        below = below.float()
    return levels


def filled(make):
    feeder = make()
    source = feeder.memory.begin_source(Source("a"))
    feeder.append(150, block_texts=["pear"] * 37, source_id=source)
    return feeder


def test_new_gists_replace_all_old_ones_and_tokens_stay(make):
    feeder = filled(make)
    memory, path = feeder.memory, feeder.memory.path
    old_reader = Memory.open(path)
    strict_reader = Memory.open(path, expect=memory.identity)
    memory.replace_gists(maker(memory), **NEW)
    for again in (memory, Memory.open(path)):
        assert (again.identity.gist_version, again.identity.gist_width) == ("gist-2", 2)
        assert torch.equal(again.tokens(), feeder.tokens.to(torch.int32))
        for level, values in expected(feeder).items():
            assert torch.equal(again.gists(level), values)
            assert again.keys(level).flatten().tolist() == [level] * len(values)
            assert again.fidelity(level).isnan().all()
        assert again.search_blocks("pear", 99)[0].shape == (37,)
        assert len(again.sources()) == 1
        assert again.verify().ok
    assert sorted(file.name for file in path.glob("*.ctx")) == sorted(
        ["L0.ctx"] + [f"{p}L{i}.g2.ctx" for i in (1, 2, 3) for p in ("", "keys.", "fidelity.")]
    )
    assert torch.equal(old_reader.gists(1), feeder.gists[1])
    assert old_reader.refresh()
    assert torch.equal(old_reader.gists(1), expected(feeder)[1])
    with pytest.raises(MemoryMismatchError, match="gist-2"):
        strict_reader.refresh()


def test_appends_and_further_rebuilds_go_on_after_one(make):
    feeder = filled(make)
    memory = feeder.memory
    memory.replace_gists(maker(memory), **NEW)
    memory.append(**feeder.batch(200))
    memory.replace_gists(maker(memory, batch=100), gist_version="gist-3")
    assert memory.n_levels == 5
    assert memory.verify().ok
    memory.close()
    with Memory.open(memory.path, "a") as again:
        assert again.generation == 4
        assert again.verify().ok


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"surplus": 1}, InvariantError),
        ({"batch": 1000, "surplus": 1}, InvariantError),
        ({"fail_on": 1}, RuntimeError),
        ({"fail_on": 3}, RuntimeError),
    ],
)
def test_a_rebuild_that_fails_changes_nothing(make, options, error):
    feeder = filled(make)
    memory = feeder.memory
    files = {file.name: file.read_bytes() for file in memory.path.glob("*.ctx")}
    with pytest.raises(error):
        memory.replace_gists(maker(memory, **options), **NEW)
    feeder.check()
    assert {file.name: file.read_bytes() for file in memory.path.glob("*.ctx")} == files
    assert memory.identity.gist_version == "gist-1"
    feeder.append(30)
    feeder.check()
    assert memory.verify().ok


def test_too_few_gists_are_refused(make):
    feeder = filled(make)
    with pytest.raises(InvariantError, match="0 gists of level 1"):
        feeder.memory.replace_gists(lambda *_: [], gist_version="x")
    feeder.check()


@pytest.mark.parametrize("name", ["pwrite", "fsync"])
def test_every_failing_write_of_a_rebuild_is_undone(make, monkeypatch, name):
    feeder = filled(make)
    memory, real = feeder.memory, getattr(os, name)
    files = {file.name for file in memory.path.glob("*.ctx")}
    site = 0
    while memory.identity.gist_version == "gist-1":
        site, calls = site + 1, [0]

        def fail(*args, site=site, calls=calls):
            calls[0] += 1
            if calls[0] == site:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            try:
                memory.replace_gists(maker(memory, batch=50), **NEW)
            except StorageFullError:
                feeder.check()
                assert {file.name for file in memory.path.glob("*.ctx")} == files
    assert site > 9
    assert memory.verify().ok


def test_files_of_a_rebuild_that_was_cut_off_go_at_the_next_writable_opening(make):
    feeder = filled(make)
    path = feeder.memory.path
    feeder.memory.close()
    (path / "L1.g2.ctx").write_bytes((path / "L1.ctx").read_bytes())
    with Memory.open(path, "a") as memory:
        assert not (path / "L1.g2.ctx").exists()
        memory.replace_gists(maker(memory), **NEW)
        assert memory.verify().ok


def test_a_memory_without_gists_only_changes_its_identity(make):
    feeder = make()
    feeder.append(3)
    feeder.memory.replace_gists(maker(feeder.memory), **NEW)
    assert feeder.memory.identity.gist_dtype == "bf16"
    feeder.memory.append(**feeder.batch(1))
    assert feeder.memory.gists(1).dtype == torch.bfloat16
