import pytest
import torch

from megacontext.errors import InputError
from megacontext.gistnet import GistNet, GistNetConfig

D, K = 16, 4


def small(**values):
    settings = {
        "kind": "transformer",
        "d_model": D,
        "block_size": K,
        "n_heads": 2,
        "context_tokens": 8,
        "max_levels": 4,
    }
    return GistNetConfig(**(settings | values))


def trained(config, scale=0.3):
    """A GistNet whose weights are all different from zero."""
    net = GistNet(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return net


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class TestMean:
    def test_is_the_mean_and_has_no_parameters(self):
        net = GistNet.untrained(D, block_size=K)
        children = tokens(5, K, D)
        gists = net.encode(children, 1)
        want = torch.stack([sum(block[1:], block[0]) / K for block in children])
        torch.testing.assert_close(gists.vectors, want)
        assert gists.fidelity.isnan().all()
        assert gists.fidelity.shape == (5,)
        assert list(net.parameters()) == []
        assert net.cost == 1
        assert torch.equal(net.encode_level(children.flatten(0, 1), 1).vectors, gists.vectors)

    def test_half_precision_children_are_averaged_in_float32(self):
        net = GistNet.untrained(D, block_size=K)
        children = tokens(5, K, D).half()
        assert torch.equal(net.encode(children, 2).vectors, net.encode(children.float(), 2).vectors)

    def test_rescale_keeps_the_mean_norm(self):
        net = GistNet(GistNetConfig(d_model=D, block_size=K, rescale=True))
        children = tokens(5, K, D)
        children[3] = 0
        gists = net.encode(children, 1).vectors
        norms = children.norm(dim=-1).mean(1)
        torch.testing.assert_close(gists.norm(dim=-1), norms)
        assert torch.equal(gists[3], torch.zeros(D))
        plain = children.mean(1)
        cosine = torch.cosine_similarity(gists[:3], plain[:3], dim=-1)
        torch.testing.assert_close(cosine, torch.ones(3))

    def test_any_level_works(self):
        net = GistNet.untrained(D, block_size=K)
        assert net.encode(tokens(1, K, D), 40).vectors.shape == (1, D)


@pytest.mark.parametrize("pooling", ["mean", "slots"])
@pytest.mark.parametrize("rescale", [False, True])
class TestUntrainedTransformer:
    def test_is_the_mean_pool_bit_for_bit(self, pooling, rescale):
        net = GistNet(small(pooling=pooling, rescale=rescale))
        mean = GistNet(GistNetConfig(d_model=D, block_size=K, rescale=rescale))
        children = tokens(5, K, D)
        for level in (1, 2, 3):
            gists = net.encode(children, level)
            assert torch.equal(gists.vectors, mean.encode(children, level).vectors)
            assert (gists.fidelity > 0).all()

    def test_wide_gist_is_the_mean_repeated(self, pooling, rescale):
        net = GistNet(small(pooling=pooling, rescale=rescale, gist_width=3 * D))
        mean = GistNet(GistNetConfig(d_model=D, block_size=K, rescale=rescale))
        children = tokens(5, K, D)
        want = mean.encode(children, 1).vectors
        gists = net.encode(children, 1).vectors
        torch.testing.assert_close(gists, want.repeat(1, 3))
        reads = net.read_embeddings(gists, torch.ones(5, dtype=torch.int64))
        torch.testing.assert_close(reads, want[:, None])


@pytest.mark.parametrize("pooling", ["mean", "slots"])
@pytest.mark.parametrize("factor", [1, 2])
class TestTransformer:
    @torch.no_grad()
    def test_three_levels(self, pooling, factor):
        net = trained(small(pooling=pooling, gist_width=factor * D))
        children = tokens(K**3, D)
        for level in (1, 2, 3):
            gists = net.encode_level(children, level)
            assert gists.vectors.shape == (len(children) // K, factor * D)
            assert gists.fidelity.shape == (len(children) // K,)
            assert gists.vectors.isfinite().all()
            assert (gists.fidelity > 0).all()
            children = gists.vectors
        assert len(children) == 1

    @torch.no_grad()
    def test_context_matters_unless_it_is_masked(self, pooling, factor):
        net = trained(small(pooling=pooling, gist_width=factor * D))
        children, context = tokens(3, K, D), tokens(3, 8, D, seed=1)
        alone = net.encode(children, 1)
        seen = net.encode(children, 1, context)
        assert not torch.allclose(seen.vectors, alone.vectors, atol=1e-3)
        assert not torch.allclose(seen.fidelity, alone.fidelity, atol=1e-4)
        hidden = torch.zeros(3, 8, dtype=torch.bool)
        for value in (context, torch.full_like(context, float("nan"))):
            masked = net.encode(children, 1, value, hidden)
            torch.testing.assert_close(masked.vectors, alone.vectors, atol=1e-5, rtol=1e-5)
        empty = net.encode(children, 1, context[:, :0])
        assert torch.equal(empty.vectors, alone.vectors)

    @torch.no_grad()
    def test_the_whole_context_is_seen(self, pooling, factor):
        net = trained(small(pooling=pooling, gist_width=factor * D))
        children, context = tokens(1, K, D), tokens(1, 8, D, seed=1)
        base = net.encode(children, 1, context).vectors
        for position in range(8):
            changed = context.clone()
            changed[:, position] += 1
            assert not torch.equal(net.encode(children, 1, changed).vectors, base)

    @torch.no_grad()
    def test_level_matters(self, pooling, factor):
        net = trained(small(pooling=pooling, gist_width=factor * D))
        children = tokens(3, K, factor * D)
        two, three = net.encode(children, 2).vectors, net.encode(children, 3).vectors
        assert not torch.allclose(two, three, atol=1e-3)

    def test_every_parameter_trains(self, pooling, factor):
        net = trained(small(pooling=pooling, gist_width=factor * D, reader_d_ff=8))
        first = net.encode(tokens(3, K, D), 1, tokens(3, 8, D, seed=1))
        loss = first.fidelity.sum()
        for level in (2, 3, 4):
            gists = net.encode(tokens(3, K, factor * D, seed=level), level)
            loss = loss + gists.fidelity.sum() + first.vectors.pow(3).sum()
            loss = loss + gists.vectors.pow(3).sum()
        levels = torch.tensor([1, 2, 4])
        loss = loss + net.read_embeddings(first.vectors, levels).pow(3).sum()
        loss.backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name

    def test_first_step_leaves_the_mean(self, pooling, factor):
        net = GistNet(small(pooling=pooling, gist_width=factor * D))
        net.encode(tokens(3, K, D), 1).vectors.pow(3).sum().backward()
        assert net.encoder.out.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_change_scales_with_the_children():
    net = trained(small())
    children, context = tokens(3, K, D), tokens(3, 8, D, seed=1)
    change = net.encode(children, 1, context).vectors - children.mean(1)
    small_change = net.encode(children / 50, 1, context / 50).vectors - children.mean(1) / 50
    torch.testing.assert_close(small_change * 50, change, atol=1e-3, rtol=1e-2)


class TestEncodeLevel:
    @pytest.mark.parametrize("before", [0, 3, 8, 13])
    @pytest.mark.parametrize("chunk", [1, 2, 64])
    @pytest.mark.parametrize("context_tokens", [0, 4, 8, 20])
    @torch.no_grad()
    def test_equals_encode_with_the_tokens_before(self, before, chunk, context_tokens):
        net = trained(small(context_tokens=context_tokens, n_layers=3))
        stream = tokens(before + 6 * K, D)
        got = net.encode_level(stream[before:], 1, stream[:before], chunk_blocks=chunk)
        for block in range(6):
            start = before + block * K
            context = stream[max(0, start - context_tokens) : start][None]
            want = net.encode(stream[start : start + K][None], 1, context)
            torch.testing.assert_close(got.vectors[block], want.vectors[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(got.fidelity[block], want.fidelity[0], atol=1e-5, rtol=1e-4)

    @torch.no_grad()
    def test_nothing_in_nothing_out(self):
        for net in (trained(small(gist_width=2 * D)), GistNet.untrained(D, block_size=K)):
            width = net.config.gist_width
            for gists in (net.encode_level(tokens(0, D), 1), net.encode(tokens(0, K, D), 1)):
                assert gists.vectors.shape == (0, width)
                assert gists.fidelity.shape == (0,)

    @torch.no_grad()
    def test_same_input_same_bits(self):
        net = trained(small())
        stream = tokens(6 * K, D)
        first, second = net.encode_level(stream, 1), net.encode_level(stream, 1)
        assert torch.equal(first.vectors, second.vectors)
        assert torch.equal(first.fidelity, second.fidelity)


def test_initial_weights_come_from_the_seed_alone():
    torch.manual_seed(5)
    first = GistNet(small())
    state = torch.get_rng_state()
    second = GistNet(small())
    assert torch.equal(torch.get_rng_state(), state)
    assert first.version == second.version
    assert GistNet(small(init_seed=1)).version != first.version


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: net.encode(tokens(2, K + 1, D), 1), r"\(2, 5, 16\), expected \[n, 4, 16\]"),
        (lambda net: net.encode(tokens(2, K, D), 2), r"\(2, 4, 16\), expected \[n, 4, 32\]"),
        (lambda net: net.encode(tokens(2, K, D), 0), "level is 0"),
        (lambda net: net.encode(tokens(2, K, 2 * D), 5), "level is 5"),
        (lambda net: net.encode(torch.zeros(2, K, D, dtype=torch.int64), 1), "not ids"),
        (lambda net: net.encode(tokens(2, K, D), 1, tokens(1, 8, D)), r"\[2, c, 16\]"),
        (lambda net: net.encode(tokens(2, K, D), 1, tokens(2, 9, D)), "9 tokens, more than"),
        (
            lambda net: net.encode(tokens(2, K, D), 1, tokens(2, 8, D), torch.ones(2, 8)),
            r"expected bool \(2, 8\)",
        ),
        (
            lambda net: net.encode(tokens(2, K, D), 1, None, torch.ones(2, 8).bool()),
            "without context",
        ),
        (lambda net: net.encode_level(tokens(K + 1, D), 1), r"\[m \* 4, 16\]"),
        (lambda net: net.encode_level(tokens(K, D), 1, tokens(1, 2, D)), r"expected \[c, 16\]"),
        (lambda net: net.encode_level(tokens(K, D), 1, chunk_blocks=0), "chunk_blocks is 0"),
        (
            lambda net: net.read_embeddings(tokens(2, D), torch.tensor([1, 1])),
            r"expected floating \[n, 32\]",
        ),
        (
            lambda net: net.read_embeddings(tokens(2, 2 * D), torch.tensor([1])),
            r"expected int64 \[2\]",
        ),
        (
            lambda net: net.read_embeddings(tokens(2, 2 * D), torch.tensor([1, 5])),
            "run from 1 to 5",
        ),
        (lambda net: net.read_kv(tokens(2, 2 * D), torch.tensor([1, 1])), "read_embeddings"),
    ],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(GistNet(small(gist_width=2 * D)))


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("net", ["mean", "wide", "slots"])
class TestStreams:
    def make(self, net):
        if net == "mean":
            return GistNet.untrained(D, block_size=K)
        return trained(small(pooling="slots") if net == "slots" else small(gist_width=2 * D))

    @torch.no_grad()
    def test_streams_are_encoded_as_each_alone(self, net, level):
        gistnet = self.make(net)
        width = D if level == 1 else gistnet.config.gist_width
        # More blocks than the context holds, so that its reach matters.
        children = tokens(3, 5, K, width)
        found = gistnet.encode_streams(children, level)
        assert found.vectors.shape == (3, 5, gistnet.config.gist_width)
        assert found.fidelity.shape == (3, 5)
        for row, stream in enumerate(children):
            alone = gistnet.encode_level(stream.flatten(0, 1), level)
            torch.testing.assert_close(found.vectors[row], alone.vectors, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(
                found.fidelity[row], alone.fidelity, atol=1e-5, rtol=1e-4, equal_nan=True
            )

    def test_there_may_be_no_streams_and_no_blocks(self, net, level):
        gistnet = self.make(net)
        width = D if level == 1 else gistnet.config.gist_width
        for streams, blocks in ((0, 3), (2, 0)):
            found = gistnet.encode_streams(torch.empty(streams, blocks, K, width), level)
            assert found.vectors.shape == (streams, blocks, gistnet.config.gist_width)
            assert found.fidelity.shape == (streams, blocks)

    @pytest.mark.parametrize("shape", [(5, K, D), (2, 5, K + 1, D), (2, 5, K, D + 1)])
    def test_other_shapes_are_refused(self, net, level, shape):
        with pytest.raises(InputError, match=r"have shape \("):
            self.make(net).encode_streams(torch.zeros(shape), level)
