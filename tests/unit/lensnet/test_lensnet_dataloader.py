import dataclasses
import json
from itertools import chain, pairwise

import pytest
import torch

from megacontext.errors import DataError
from megacontext.lensnet import (
    N_FEATURES,
    LensNet,
    LensNetConfig,
    Snapshot,
    SnapshotDataset,
    SnapshotLoader,
    collate,
    write_snapshots,
)

D, WIDTH = 8, 16


def snapshot(seed, n=3, m=2, t=4, width=D):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    return Snapshot(
        entry_levels=torch.arange(n),
        entry_starts=torch.arange(n) * 32,
        entry_vectors=draw(n, WIDTH).half(),
        entry_features=draw(n, N_FEATURES),
        entry_can_expand=draw(n) > 0,
        entry_can_collapse=draw(n) > 0,
        entry_utility=draw(n),
        cache_levels=torch.ones(m, dtype=torch.int64),
        cache_starts=torch.arange(m) * 64,
        cache_vectors=draw(m, WIDTH).half(),
        cache_features=draw(m, N_FEATURES),
        cache_utility=draw(m),
        cache_evidence=draw(m).sign().clamp(min=0),
        tail_hidden=draw(t, width).bfloat16(),
        cursor=torch.tensor(1000 + seed),
        tail_start=torch.tensor(900),
    )


def many(count):
    return [snapshot(i, n=1 + i % 4, m=i % 3, t=1 + i % 5) for i in range(count)]


def equal(first, second):
    return all(
        torch.equal(getattr(first, f.name), getattr(second, f.name))
        and getattr(first, f.name).dtype == getattr(second, f.name).dtype
        for f in dataclasses.fields(Snapshot)
    )


@pytest.mark.parametrize("shard_size", [1, 3, 4, 100])
def test_round_trip_is_bit_identical(tmp_path, shard_size):
    snapshots = many(10)
    assert write_snapshots(tmp_path / "set", iter(snapshots), shard_size=shard_size) == 10
    dataset = SnapshotDataset(tmp_path / "set")
    assert len(dataset) == 10
    assert len(dataset.shard_bounds) == -(-10 // shard_size) + 1
    for index in (*range(10), -1):
        assert equal(dataset[index], snapshots[index])
    for index in (10, -11):
        with pytest.raises(IndexError):
            dataset[index]


def test_collate_pads_with_masks():
    first, second = snapshot(0, n=3, m=0, t=2), snapshot(1, n=1, m=2, t=4)
    batch = collate([first, second])
    assert batch.entries.mask.tolist() == [[True, True, True], [True, False, False]]
    assert batch.cache.mask.tolist() == [[False, False], [True, True]]
    assert batch.tail.mask.tolist() == [[False, False, True, True], [True] * 4]
    assert torch.equal(batch.tail.hidden[0, 2:], first.tail_hidden.float())
    assert torch.equal(batch.entries.vectors[1, :1], second.entry_vectors.float())
    assert not batch.entries.vectors[1, 1:].any()
    assert not batch.entries.can_expand[1, 1:].any()
    assert torch.equal(batch.entry_utility[0], first.entry_utility)
    assert batch.entry_utility[1, 1:].isnan().all()
    assert batch.cache_utility[0].isnan().all()
    assert batch.cursor.tolist() == [1000, 1001]
    with pytest.raises(DataError, match="at least one"):
        collate([])


@torch.no_grad()
def test_a_batch_scores_as_its_snapshots_do():
    config = LensNetConfig(d_model=D, gist_width=WIDTH, d_hidden=16, n_heads=2, d_ff=8)
    net = LensNet(config)
    for parameter in net.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    snapshots = many(4)
    batch = collate(snapshots)
    scores = net(batch.entries, batch.cache, batch.tail)
    for index, single in enumerate(snapshots):
        alone = collate([single])
        want = net(alone.entries, alone.cache, alone.tail)
        n, m = len(single.entry_levels), len(single.cache_levels)
        torch.testing.assert_close(scores.entry[index, :n], want.entry[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(scores.cache[index, :m], want.cache[0], atol=1e-5, rtol=1e-4)
        assert not scores.entry[index, n:].any()
        assert not scores.cache[index, m:].any()


@pytest.fixture
def dataset(tmp_path):
    write_snapshots(tmp_path / "set", many(10), shard_size=4)
    return SnapshotDataset(tmp_path / "set")


def cursors(loader):
    return [batch.cursor.tolist() for batch in loader]


def flat(batches):
    return list(chain.from_iterable(batches))


def test_an_epoch_replays_every_snapshot_once(dataset):
    loader = SnapshotLoader(dataset, batch_size=3, seed=1)
    first, second = cursors(loader), cursors(loader)
    assert [len(batch) for batch in first] == [3, 3, 3, 1]
    assert len(loader) == 4
    for epoch in (first, second):
        assert sorted(flat(epoch)) == list(range(1000, 1010))
    assert first != second
    assert loader.epoch == 2


def test_seed_decides_the_order(dataset):
    again = [cursors(SnapshotLoader(dataset, batch_size=3, seed=seed)) for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]
    stored = cursors(SnapshotLoader(dataset, batch_size=4, shuffle=False))
    assert flat(stored) == list(range(1000, 1010))


def test_shuffling_stays_within_shards(dataset):
    order = flat(cursors(SnapshotLoader(dataset, batch_size=1, seed=5)))
    shards = [(cursor - 1000) // 4 for cursor in order]
    assert sum(a != b for a, b in pairwise(shards)) == 2


def test_drop_last(dataset):
    loader = SnapshotLoader(dataset, batch_size=3, drop_last=True)
    assert [len(batch) for batch in cursors(loader)] == [3, 3, 3]
    with pytest.raises(DataError, match="do not fill a batch of 11"):
        SnapshotLoader(dataset, batch_size=11, drop_last=True)


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8])
def test_resumes_where_it_stopped(dataset, stop):
    def stream(loader, count):
        seen = []
        while True:
            for batch in loader:
                seen.append(batch.cursor.tolist())
                if len(seen) == count:
                    return seen

    whole = stream(SnapshotLoader(dataset, batch_size=3, seed=1), 12)
    first = SnapshotLoader(dataset, batch_size=3, seed=1)
    seen = stream(first, stop)
    state = json.loads(json.dumps(first.state_dict()))
    second = SnapshotLoader(dataset, batch_size=3, seed=1)
    second.load_state_dict(state)
    assert seen + stream(second, 12 - stop) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed 2"),
        ({"batch_size": 4}, "batch_size 4"),
        ({"snapshots": 11}, "snapshots 11"),
        ({"epoch": None}, "no epoch"),
        ({"batch": 9}, "batch 9"),
    ],
)
def test_foreign_state_is_refused(dataset, change, message):
    loader = SnapshotLoader(dataset, batch_size=3, seed=1)
    with pytest.raises(DataError, match=message):
        loader.load_state_dict(loader.state_dict() | change)


def test_snapshots_must_fit_together(tmp_path):
    with pytest.raises(DataError, match=r"snapshot 1 has other widths.*tail_hidden"):
        write_snapshots(tmp_path / "a", [snapshot(0), snapshot(1, width=2 * D)])
    broken = dataclasses.replace(snapshot(0), entry_starts=torch.arange(9))
    with pytest.raises(DataError, match="entry_starts has 9 rows, expected 3"):
        write_snapshots(tmp_path / "b", [broken])
    with pytest.raises(DataError, match="cursor has shape"):
        write_snapshots(
            tmp_path / "c", [dataclasses.replace(snapshot(0), cursor=torch.zeros(1).long())]
        )
    with pytest.raises(DataError, match="no snapshots"):
        write_snapshots(tmp_path / "d", [])
    for name in "abcd":
        with pytest.raises(DataError, match=r"index\.json: no such file"):
            SnapshotDataset(tmp_path / name)


def test_an_existing_set_is_kept(dataset):
    with pytest.raises(DataError, match="holds snapshots already"):
        write_snapshots(dataset.folder, many(1))
    assert len(SnapshotDataset(dataset.folder)) == 10


def test_damaged_files_are_named(dataset):
    shard = dataset.folder / "shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    fresh = SnapshotDataset(dataset.folder)
    assert fresh[0].cursor == 1000
    with pytest.raises(DataError, match=r"shard-00001\.safetensors: not a whole shard"):
        fresh[4]
    shard.unlink()
    with pytest.raises(DataError, match=r"shard-00001\.safetensors: not a whole shard"):
        fresh[4]
    index = dataset.folder / "index.json"
    values = json.loads(index.read_text())
    values["shards"][0]["count"] = 3
    index.write_text(json.dumps(values))
    with pytest.raises(DataError, match="does not hold 3"):
        SnapshotDataset(dataset.folder)[0]
    for text, message in (
        ("{", "cannot be read"),
        ("{}", "not the index"),
        (json.dumps(values | {"version": 1}), "format version 1"),
    ):
        index.write_text(text)
        with pytest.raises(DataError, match=message):
            SnapshotDataset(dataset.folder)
