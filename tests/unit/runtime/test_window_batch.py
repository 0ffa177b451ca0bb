"""A batch of windows gives what the running engine's forward gives for each of them alone."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.gistnet import GistNet, GistNetConfig
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.history_buffers import HistoryBuffers
from megacontext.runtime.window_batch import plain_states, window_states
from megacontext.runtime.window_layout import WindowLayout

K, SLOTS, BLOCKS = 4, 2, 6
# Two windows of three raw blocks, one level-1 gist … and, in the other set, a level-2 gist.
LEVELS = {
    "blocks": [[0, 1, 0, 0, 1, 0], [1, 1, 0, 0, 0, 0]],
    "span": [[2, 2, 2, 2, 0, 0], [2, 2, 2, 2, 0, 0]],
    "span and block": [[2, 2, 2, 2, 1, 0], [2, 2, 2, 2, 0, 1]],
}
# Grouped heads with key norm, sliding layers among full ones, sliding layers only, some layers
# without rotation.
ARCHITECTURES = ("qwen3", "gemma3", "mixtral-sliding", "smollm3", "gpt-neox")


def gistnet_for(base, reader):
    shape = {"kv_layers": base.n_layers, "kv_heads": base.n_kv_heads,
             "kv_head_dim": base.head_dim, "kv_value_dim": base.value_dim}  # fmt: skip
    config = GistNetConfig(
        kind="transformer", d_model=base.d_model, gist_width=2 * base.d_model, block_size=K,
        context_tokens=2 * K, reader=reader, slots=SLOTS, max_levels=3,
        **(shape if reader == "kv" else {}),
    )  # fmt: skip
    net = GistNet(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net


def embedded(base, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return base.embed(torch.randint(0, 256, (batch, BLOCKS * K), generator=generator))


def layout_of(levels):
    return WindowLayout.of(torch.tensor(levels), block_size=K, slots=SLOTS)


def context_of(base, net, buffers, levels, row, slots=SLOTS):
    """The window as the engine hands it to the base, and which of its rows are raw."""
    raw, raw_positions, gists, gist_levels, gist_positions = [], [], [], [], []
    here = block = 0
    while block < BLOCKS:
        level = levels[row][block]
        if level == 0:
            raw += range(block * K, (block + 1) * K)
            raw_positions += range(here, here + K)
            here += K
        else:
            gists.append(block if level == 1 else BLOCKS + block // K)
            gist_levels.append(level)
            gist_positions += range(here, here + slots)
            here += slots
        block += K if level == 2 else 1
    vectors, gist_levels = buffers.gists[row, gists], torch.tensor(gist_levels)
    rows = buffers.embeddings[row, raw]
    if net.config.reader == "kv":
        read = (part[:, :, :slots] for part in net.read_kv(vectors, gist_levels))
        keys, values = (part.flatten(1, 2) for part in read)
        positions = torch.tensor(gist_positions)
        return ContextInput(rows, torch.tensor(raw_positions), keys, values, positions), slice(None)
    # Embedding gists are rows among the others.
    read = net.read_embeddings(vectors, gist_levels)[:, :slots].flatten(0, 1)
    order = torch.tensor(raw_positions + gist_positions).argsort()
    context = ContextInput(torch.cat((rows, read))[order], torch.arange(len(order)))
    return context, torch.tensor(raw_positions)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_raw_window_is_the_plain_model(architecture):
    base = tiny_base_model(architecture)
    net = gistnet_for(base, "kv")
    ids = torch.randint(0, 256, (2, BLOCKS * K), generator=torch.Generator().manual_seed(0))
    buffers = HistoryBuffers.encode(net, base.embed(ids))
    layout = layout_of([[0] * BLOCKS] * 2)
    found = window_states(base, net, buffers, layout)
    plain = plain_states(base, buffers.embeddings, layout.positions)
    for row in range(2):
        wanted = base.features(ids[row])
        torch.testing.assert_close(found[row], wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(plain[row], wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("reader", ["kv", "embedding"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_window_with_gists_is_the_context_of_the_engine(architecture, reader, levels):
    base = tiny_base_model(architecture)
    net = gistnet_for(base, reader)
    buffers = HistoryBuffers.encode(net, embedded(base), levels=2)
    found = window_states(base, net, buffers, layout_of(levels))
    assert found.shape == (2, levels[0].count(0) * K, base.d_model)
    for row in range(2):
        context, raw = context_of(base, net, buffers, levels, row)
        wanted = base.prefill(context, hidden_states=True).hidden[raw]
        torch.testing.assert_close(found[row], wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("reader", ["kv", "embedding"])
def test_fewer_slots_are_the_first_of_a_gist(reader):
    base = tiny_base_model()
    net = gistnet_for(base, reader)
    buffers = HistoryBuffers.encode(net, embedded(base), levels=2)
    levels = LEVELS["span and block"]
    layout = WindowLayout.of(torch.tensor(levels), block_size=K, slots=1)
    found = window_states(base, net, buffers, layout)
    for row in range(2):
        context, raw = context_of(base, net, buffers, levels, row, slots=1)
        wanted = base.prefill(context, hidden_states=True).hidden[raw]
        torch.testing.assert_close(found[row], wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("reader", ["kv", "embedding"])
def test_only_rows_behind_a_gist_see_it(reader):
    base = tiny_base_model()
    net = gistnet_for(base, reader)
    buffers = HistoryBuffers.encode(net, embedded(base))
    layout = layout_of([[0, 1, 0, 0, 0, 0]] * 2)
    before = window_states(base, net, buffers, layout)
    buffers.gists[:, 1] += 1
    after = window_states(base, net, buffers, layout)
    assert torch.equal(before[:, :K], after[:, :K])
    assert ((before - after)[:, K:].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("reader", ["kv", "embedding"])
def test_gradients_reach_the_gistnet_and_never_the_base(reader):
    base = tiny_base_model()
    net = gistnet_for(base, reader)
    buffers = HistoryBuffers.encode(net, embedded(base), levels=2)
    states = window_states(base, net, buffers, layout_of(LEVELS["span and block"]))
    states.square().sum().backward()
    for name, parameter in net.named_parameters():
        # Fidelity is no part of what the base reads.
        if "fidelity" not in name:
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in base.model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("reader", ["kv", "embedding"])
@pytest.mark.parametrize("levels", [[[0] * BLOCKS], [[0, 1, 0, 0, 0, 0]]])
def test_a_decoder_given_is_the_one_that_runs(reader, levels):
    base = tiny_base_model()
    net = gistnet_for(base, reader)
    buffers = HistoryBuffers.encode(net, embedded(base, batch=1))
    calls = []

    def decoder(**inputs):
        calls.append(inputs)
        return base.model.get_decoder()(**inputs)

    layout = layout_of(levels)
    found = window_states(base, net, buffers, layout, decoder=decoder)
    assert len(calls) == 1
    assert torch.equal(found, window_states(base, net, buffers, layout))
