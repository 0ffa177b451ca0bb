import pytest
import torch
from torch.nn import functional as F

from megacontext.errors import InputError
from megacontext.gistnet import GistNet, GistNetConfig

D = 16
KV = {"reader": "kv", "kv_layers": 3, "kv_heads": 2, "kv_head_dim": 4}


def make(**values):
    net = GistNet(GistNetConfig(d_model=D, block_size=4, max_levels=4, **values))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def slow_read(net, gist, level):
    """One gist, one layer, one slot, one head at a time."""
    config, reader = net.config, net.reader
    x = reader.norm(gist) + reader.levels.weight[level]
    if reader.mlp is not None:
        x = reader.mlp(x)
    keys = torch.empty(config.kv_layers, config.slots, config.kv_heads, config.kv_head_dim)
    values = torch.empty(config.kv_layers, config.slots, config.kv_heads, config.kv_value_dim)
    for layer in range(config.kv_layers):
        for slot in range(config.slots):
            for result, weight, bias, dim in (
                (keys, reader.key_map, reader.key_bias, config.kv_head_dim),
                (values, reader.value_map, reader.value_bias, config.kv_value_dim),
            ):
                if config.kv_rank:
                    flat = (x @ reader.down[slot]) @ weight[layer]
                else:
                    flat = x @ weight[layer, slot]
                flat = flat + bias[layer, 0, slot]
                for head in range(config.kv_heads):
                    result[layer, slot, head] = flat[head * dim : (head + 1) * dim]
            if config.key_norm:
                for head in range(config.kv_heads):
                    key = keys[layer, slot, head]
                    size = (key.pow(2).mean() + 1e-6).sqrt()
                    keys[layer, slot, head] = key / size * reader.key_scale[layer]
    return keys, values


@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("key_norm", [False, True])
@pytest.mark.parametrize(("slots", "d_ff", "value_dim"), [(1, 0, 4), (6, 8, 4), (3, 0, 7)])
@torch.no_grad()
def test_kv_reader_equals_the_slow_reference(rank, key_norm, slots, d_ff, value_dim):
    net = make(
        **KV,
        kv_rank=rank,
        key_norm=key_norm,
        slots=slots,
        reader_d_ff=d_ff,
        kv_value_dim=value_dim,
    )
    assert net.cost == slots
    gists, levels = torch.randn(5, D), torch.tensor([1, 1, 2, 4, 3])
    keys, values = net.read_kv(gists, levels)
    assert keys.shape == (3, 5, slots, 2, 4)
    assert values.shape == (3, 5, slots, 2, value_dim)
    for index in range(5):
        want_keys, want_values = slow_read(net, gists[index], int(levels[index]))
        torch.testing.assert_close(keys[:, index], want_keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(values[:, index], want_values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [0, 5])
def test_every_kv_parameter_trains(rank):
    net = make(**KV, kv_rank=rank, key_norm=True, slots=2, reader_d_ff=8)
    keys, values = net.read_kv(torch.randn(4, D), torch.tensor([1, 2, 3, 4]))
    (keys.pow(3).sum() + values.pow(3).sum()).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_half_precision_gists_are_read_in_the_weights_type():
    net = make(**KV)
    gists, levels = torch.randn(4, D).half(), torch.ones(4, dtype=torch.int64)
    keys, values = net.read_kv(gists, levels)
    want_keys, want_values = net.read_kv(gists.float(), levels)
    assert keys.dtype == torch.float32
    assert torch.equal(keys, want_keys)
    assert torch.equal(values, want_values)


@torch.no_grad()
def test_no_gists_read_as_nothing():
    none = torch.ones(0, dtype=torch.int64)
    keys, values = make(**KV, slots=2).read_kv(torch.zeros(0, D), none)
    assert keys.shape == values.shape == (3, 0, 2, 2, 4)
    assert make(slots=2).read_embeddings(torch.zeros(0, D), none).shape == (0, 2, D)


def test_kv_gists_are_not_embeddings():
    with pytest.raises(InputError, match="read_kv"):
        make(**KV).read_embeddings(torch.zeros(1, D), torch.ones(1, dtype=torch.int64))


def test_narrow_gist_in_one_slot_is_the_embedding_itself():
    gists = torch.randn(5, D)
    net = GistNet.untrained(D)
    assert torch.equal(net.read_embeddings(gists, torch.ones(5).long()), gists[:, None])
    with_mlp = GistNet(GistNetConfig(d_model=D, reader_d_ff=8))
    assert torch.equal(with_mlp.read_embeddings(gists, torch.ones(5).long()), gists[:, None])


@pytest.mark.parametrize(("factor", "slots"), [(1, 3), (2, 2), (2, 1), (3, 5)])
@torch.no_grad()
def test_untrained_slots_hand_out_the_gists_chunks(factor, slots):
    config = GistNetConfig(
        kind="transformer", d_model=D, n_heads=2, gist_width=factor * D, slots=slots
    )
    net = GistNet(config)
    gists = torch.randn(4, factor * D)
    reads = net.read_embeddings(gists, torch.ones(4).long())
    assert reads.shape == (4, slots, D)
    chunks = gists.chunk(factor, dim=1)
    for slot in range(slots):
        torch.testing.assert_close(reads[:, slot], chunks[slot % factor])


@torch.no_grad()
def test_level_matters_to_a_trained_reader():
    gists = torch.randn(2, D)
    for net in (make(reader_d_ff=8), make(**KV)):
        read = net.read_kv if net.config.reader == "kv" else net.read_embeddings
        one, two = read(gists, torch.tensor([1, 1])), read(gists, torch.tensor([2, 2]))
        first, second = (one[0], two[0]) if net.config.reader == "kv" else (one, two)
        assert not torch.allclose(first, second, atol=1e-3)


@torch.no_grad()
def test_normalised_keys_have_unit_rms_times_scale():
    net = GistNet(GistNetConfig(d_model=D, **KV, key_norm=True))
    keys, _ = net.read_kv(100 * torch.randn(3, D), torch.ones(3).long())
    torch.testing.assert_close(F.rms_norm(keys, (4,), eps=1e-6), keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize(
    "values",
    [KV, KV | {"kv_rank": 5, "key_norm": True, "reader_d_ff": 8}, {}, {"reader_d_ff": 8}],
    ids=["kv", "kv-rank", "embedding", "embedding-mlp"],
)
@torch.no_grad()
def test_fewer_slots_are_the_first_of_all(values, slots):
    net = make(**values, slots=3)
    gists, levels = torch.randn(5, D), torch.tensor([1, 1, 2, 4, 3])
    kv = net.config.reader == "kv"
    read = net.read_kv if kv else net.read_embeddings
    whole, part = read(gists, levels), read(gists, levels, slots)
    pairs = zip(whole, part, strict=True) if kv else [(whole[None], part[None])]
    for everything, first in pairs:
        torch.testing.assert_close(first, everything[:, :, :slots])


@pytest.mark.parametrize("slots", [0, -1, 4])
@pytest.mark.parametrize("values", [KV, {}], ids=["kv", "embedding"])
def test_slots_that_a_gist_lacks_are_refused(values, slots):
    net = make(**values, slots=3)
    read = net.read_kv if values else net.read_embeddings
    with pytest.raises(InputError, match=f"slots is {slots}, expected 1 to 3"):
        read(torch.randn(2, D), torch.tensor([1, 1]), slots)
