"""Windowed attention against a reference that looks at one query at a time."""

import pytest
import torch

from megacontext.gistnet.blocks import ResidualMLP, SlotQueries, WindowAttention, rotate

WIDTH, HEADS, SIZE = 16, 2, 3


def slow_rotate(vector, position, theta):
    half = len(vector) // 2
    result = vector.clone()
    for i in range(half):
        angle = torch.tensor(position * theta ** (-i / half))
        a, b = vector[i], vector[half + i]
        result[i] = a * angle.cos() - b * angle.sin()
        result[half + i] = b * angle.cos() + a * angle.sin()
    return result


def slow_attention(layer, x, valid, window):
    """One stream ``[blocks, SIZE, WIDTH]``, absolute positions."""
    blocks = len(x)
    flat, readable = x.flatten(0, 1), valid.flatten()
    dim = WIDTH // HEADS
    results = []
    for i in range(blocks * SIZE):
        block = i // SIZE
        first = max(0, block - window) * SIZE
        seen = [j for j in range(first, (block + 1) * SIZE) if readable[j] or j == i]
        outs = []
        for head in range(HEADS):
            part = slice(head * dim, (head + 1) * dim)
            query = layer.query_norm(layer.query(flat[i])[part])
            query = slow_rotate(query, i, layer.theta)
            logits, values = [], []
            for j in seen:
                key, value = layer.key_value(flat[j]).chunk(2)
                key = slow_rotate(layer.key_norm(key[part]), j, layer.theta)
                logits.append(query @ key / dim**0.5)
                values.append(value[part])
            weights = torch.stack(logits).softmax(0)
            outs.append((weights[:, None] * torch.stack(values)).sum(0))
        results.append(layer.out(torch.cat(outs)))
    return torch.stack(results).unflatten(0, (blocks, SIZE))


@pytest.mark.parametrize("window", [0, 1, 2, 7])
@pytest.mark.parametrize("n_out", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_window_attention_equals_the_slow_reference(window, n_out, padded):
    torch.manual_seed(window * 10 + n_out)
    layer = WindowAttention(WIDTH, HEADS, 100.0)
    x = torch.randn(2, 4, SIZE, WIDTH)
    valid = torch.ones(2, 4, SIZE, dtype=torch.bool)
    if padded:
        valid[0, 0] = False
        valid[1, 1, :2] = False
    got = layer(x, valid if padded else None, window, n_out)
    for stream in range(2):
        want = slow_attention(layer, x[stream], valid[stream], window)[-n_out:]
        torch.testing.assert_close(got[stream], want, atol=1e-5, rtol=1e-4)


def test_rotation_keeps_dot_products_at_equal_distance():
    torch.manual_seed(0)
    q, k = torch.randn(1, 8), torch.randn(1, 8)

    def dot(a, b):
        return (rotate(q, torch.tensor([a]), 50.0) * rotate(k, torch.tensor([b]), 50.0)).sum()

    torch.testing.assert_close(dot(5, 2), dot(3, 0))
    torch.testing.assert_close(dot(-4, -7), dot(3, 0))
    assert not torch.isclose(dot(5, 2), dot(5, 3))


def test_residual_mlp_starts_as_the_identity_when_asked():
    x = torch.randn(3, 8)
    assert torch.equal(ResidualMLP(8, 16, zero_init=True)(x), x)
    assert not torch.equal(ResidualMLP(8, 16)(x), x)


@torch.no_grad()
def test_slot_queries_do_not_mind_the_order_of_states():
    torch.manual_seed(0)
    pool = SlotQueries(16, 2, 3)
    states = torch.randn(2, 5, 16)
    pooled = pool(states)
    assert pooled.shape == (2, 3, 16)
    torch.testing.assert_close(pool(states.flip(1)), pooled)
    assert not torch.allclose(pool(states + torch.randn(2, 5, 16)), pooled)
