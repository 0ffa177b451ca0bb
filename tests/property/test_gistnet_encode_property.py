"""Whatever the window, level and ragged context: padding is never seen and blocks never mix."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megacontext.gistnet import GistNet, GistNetConfig

D = 8


def make(size, context_blocks, n_layers, pooling):
    config = GistNetConfig(
        kind="transformer",
        d_model=D,
        d_ff=8,
        n_heads=2,
        block_size=size,
        context_tokens=size * context_blocks,
        n_layers=n_layers,
        pooling=pooling,
    )
    net = GistNet(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def close(first, second):
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


SHAPES = {
    "size": st.integers(2, 4),
    "context_blocks": st.integers(0, 4),
    "n_layers": st.integers(1, 3),
    "pooling": st.sampled_from(["mean", "slots"]),
    "seed": st.integers(0, 2**31),
}


@settings(max_examples=30, deadline=None)
@given(**SHAPES, data=st.data())
@torch.no_grad()
def test_ragged_contexts_in_one_batch_equal_each_alone(
    size, context_blocks, n_layers, pooling, seed, data
):
    net = make(size, context_blocks, n_layers, pooling)
    generator = torch.Generator().manual_seed(seed)
    reach = size * context_blocks
    lengths = data.draw(st.lists(st.integers(0, reach), min_size=1, max_size=4))
    n, level = len(lengths), data.draw(st.integers(1, 3))
    children = torch.randn(n, size, D, generator=generator)
    context = torch.full((n, reach, D), float("nan"))
    mask = torch.zeros(n, reach, dtype=torch.bool)
    for row, length in enumerate(lengths):
        context[row, reach - length :] = torch.randn(length, D, generator=generator)
        mask[row, reach - length :] = True
    together = net.encode(children, level, context, mask)
    for row, length in enumerate(lengths):
        own = context[row : row + 1, reach - length :]
        alone = net.encode(children[row : row + 1], level, own)
        close(together.vectors[row], alone.vectors[0])
        close(together.fidelity[row], alone.fidelity[0])


@settings(max_examples=30, deadline=None)
@given(**SHAPES, blocks=st.integers(1, 7), chunk=st.integers(1, 7), before=st.integers(0, 14))
@torch.no_grad()
def test_a_stream_in_pieces_equals_the_stream(
    size, context_blocks, n_layers, pooling, seed, blocks, chunk, before
):
    net = make(size, context_blocks, n_layers, pooling)
    stream = torch.randn(before + blocks * size, D, generator=torch.Generator().manual_seed(seed))
    whole = net.encode_level(stream[before:], 1, stream[:before])
    pieces = [
        net.encode_level(stream[at : at + size], 1, stream[:at], chunk_blocks=chunk).vectors
        for at in range(before, len(stream), size)
    ]
    close(torch.cat(pieces), whole.vectors)
    again = net.encode_level(stream[before:], 1, stream[:before], chunk_blocks=chunk)
    close(again.vectors, whole.vectors)
    close(again.fidelity, whole.fidelity)


@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 6), n=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_mean_of_means_is_the_mean_of_all_tokens(size, n, seed):
    net = GistNet.untrained(D, block_size=size)
    tokens = torch.randn(n * size * size, D, generator=torch.Generator().manual_seed(seed))
    first = net.encode_level(tokens, 1).vectors
    second = net.encode_level(first, 2).vectors
    close(second, tokens.reshape(n, size * size, D).mean(dim=1))
