import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.runtime import kv_cache
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.incremental_cache import Carried, behind, carry, compute, find, with_gists


@pytest.fixture(scope="module")
def base():
    return tiny_base_model("gemma3")


def ids(n, seed=1):
    return torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed))


def read(base, n=8, gists=(0, 1, 5)):
    shape = (base.n_layers, len(gists), base.n_kv_heads, base.head_dim)
    keys, values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(2))
    at = torch.tensor([p for p in range(n + len(gists)) if p not in gists])
    context = ContextInput(base.embed(ids(n)), at, keys, values, torch.tensor(gists))
    return context, base.prefill(context).cache


def entry(cache, index):
    return [(layer.keys[0, :, index], layer.values[0, :, index]) for layer in cache.entries.layers]


class TestFind:
    def test_places(self):
        known = torch.tensor([7, -3, 12, 0])
        assert find(known, torch.tensor([0, 5, 7, 13, -3, -9])).tolist() == [3, -1, 0, -1, 1, -1]

    def test_nothing(self):
        none = torch.empty(0, dtype=torch.int64)
        assert find(none, torch.tensor([1, 2])).tolist() == [-1, -1]
        assert find(torch.tensor([1]), none).tolist() == []


class TestBehind:
    @pytest.mark.parametrize("reach", range(6))
    def test_against_a_loop(self, reach):
        inserted = torch.tensor([0, 1, 1, 0, 0, 0, 0, 1, 0, 0], dtype=torch.bool)
        expected = [bool(inserted[max(0, i - reach) : i].any()) for i in range(10)]
        assert behind(inserted, reach).tolist() == expected


class TestCarry:
    def test_moved_entries_are_rotated_and_values_stay(self, base):
        _, cache = read(base)
        before = torch.cat((cache.gist_positions, cache.positions))
        source, to = torch.tensor([1, 2, 3, 6, 9]), torch.tensor([1, 3, 0, 17, 60])
        carried = carry(base, cache, Carried(source, to, 2), 60)
        assert carried.gist_positions.tolist() == [1, 3]
        assert carried.positions.tolist() == [0, 17, 60]
        for index, (old, new) in enumerate(zip(source.tolist(), to, strict=True)):
            keys = torch.stack([keys for keys, _ in entry(cache, old)])[:, None]
            plain = base.rotation.unrotate(keys, before[old : old + 1])
            keys = base.rotation.rotate(plain, new[None])[:, 0]
            for layer, (key, value) in enumerate(entry(carried, index)):
                assert (key - keys[layer]).abs().max() < 1e-4
                assert torch.equal(value, entry(cache, old)[layer][1])

    def test_what_does_not_move_keeps_its_bits(self, base):
        _, cache = read(base)
        source = torch.tensor([0, 2, 4, 5])
        before = torch.cat((cache.gist_positions, cache.positions))[source]
        carried = carry(base, cache, Carried(source, before + torch.tensor([0, 0, 0, 3]), 2), 20)
        for index in range(3):
            for (key, _), (old, _) in zip(
                entry(carried, index), entry(cache, int(source[index])), strict=True
            ):
                assert torch.equal(key, old)

    def test_a_beginning_is_cut_off_without_a_copy(self, base):
        _, cache = read(base)
        positions = torch.cat((cache.gist_positions, cache.positions))[:7]
        carried = carry(base, cache, Carried(torch.arange(7), positions, 3), 20)
        assert (carried.n_gists, carried.n_rows) == (3, 4)
        mine, old = carried.entries.layers[0].keys, cache.entries.layers[0].keys
        assert mine.data_ptr() == old.data_ptr()
        assert len(cache) == 11

    def test_moving_often_loses_nothing_in_half_precision(self):
        base = tiny_base_model("llama-yarn", dtype=torch.bfloat16)
        keys = torch.randn(base.n_layers, 20, base.n_kv_heads, base.head_dim).bfloat16()
        at = torch.arange(20)
        layers = [layer.transpose(0, 1)[None] for layer in keys]
        layers = base.rotation.shift(layers, at, at + 7)
        moved = torch.stack([layer[0].transpose(0, 1) for layer in layers])
        expected = base.rotation.rotate(base.rotation.unrotate(keys.float(), at), at + 7)
        assert (moved.float() - expected).abs().max() < 2e-2
        assert moved.dtype == torch.bfloat16


def test_new_gists_stand_in_order_before_the_rows(base):
    _, cache = read(base, gists=(0, 5))
    _, others = read(base, gists=(2, 3, 7))
    others = kv_cache.crop(others, 0)
    joined = with_gists(cache, others)
    assert joined.gist_positions.tolist() == [0, 2, 3, 5, 7]
    assert torch.equal(joined.positions, cache.positions)
    sources = [(cache, 0), (others, 0), (others, 1), (cache, 1), (others, 2)]
    sources += [(cache, 2 + row) for row in range(cache.n_rows)]
    for index, (source, place) in enumerate(sources):
        for (key, value), (old_key, old_value) in zip(
            entry(joined, index), entry(source, place), strict=True
        ):
            assert torch.equal(key, old_key)
            assert torch.equal(value, old_value)


def test_rows_computed_between_others_see_what_stands_before_them(base):
    """Rows left out and computed afterwards come out as if nothing had been left out."""
    context, whole = read(base, n=14, gists=(0, 1, 6))
    missing = torch.tensor([2, 5, 6, 11, 13])
    there = torch.tensor([row for row in range(14) if row not in missing])
    known = carry(
        base,
        whole,
        Carried(
            torch.cat((torch.arange(3), there + 3)),
            torch.cat((whole.gist_positions, whole.positions[there])),
            3,
        ),
        16,
    )
    cache, logits = compute(base, known, context.embeddings[missing], context.positions[missing])
    assert (logits - base.prefill(context, keep=1).logits[-1]).abs().max() < 1e-4
    for index, row in enumerate(torch.cat((there, missing)).tolist()):
        for (key, value), (old_key, old_value) in zip(
            entry(cache, 3 + index), entry(whole, 3 + row), strict=True
        ):
            assert (key - old_key).abs().max() < 1e-4
            assert (value - old_value).abs().max() < 1e-4
    assert known.n_rows == len(there), "the known cache must stay usable"
