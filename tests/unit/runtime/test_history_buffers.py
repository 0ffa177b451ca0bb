from __future__ import annotations

import pytest
import torch

from megacontext.errors import InputError
from megacontext.gistnet import GistNet, GistNetConfig
from megacontext.runtime.history_buffers import HistoryBuffers

D, K = 16, 4


def trained_gistnet(**values):
    config = {"kind": "transformer", "d_model": D, "gist_width": 2 * D, "block_size": K,
              "context_tokens": 8, "n_heads": 2, "max_levels": 4}  # fmt: skip
    net = GistNet(GistNetConfig(**(config | values)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return net


def texts(batch, tokens, seed=0):
    return torch.randn(batch, tokens, D, generator=torch.Generator().manual_seed(seed))


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_both_levels_are_those_of_each_text_alone():
    net = trained_gistnet()
    # Six blocks: one whole span, and two blocks that no span covers.
    embeddings = texts(3, 6 * K)
    buffers = HistoryBuffers.encode(net, embeddings, levels=2)
    assert buffers.embeddings is embeddings
    assert (buffers.n_blocks, buffers.block_size, buffers.levels) == (6, K, 2)
    assert buffers.gists.shape == (3, 7, 2 * D)
    for row in range(3):
        blocks = net.encode_level(embeddings[row], 1)
        spans = net.encode_level(blocks.vectors[:K], 2)
        close(buffers.gists[row], torch.cat((blocks.vectors, spans.vectors)))
        close(buffers.fidelity[row], torch.cat((blocks.fidelity, spans.fidelity)))


@torch.no_grad()
@pytest.mark.parametrize(("blocks", "levels", "gists"), [(6, 1, 6), (3, 2, 3), (8, 2, 10)])
def test_there_is_a_gist_for_every_whole_node(blocks, levels, gists):
    buffers = HistoryBuffers.encode(trained_gistnet(), texts(2, blocks * K), levels=levels)
    assert buffers.gists.shape == (2, gists, 2 * D)
    assert buffers.fidelity.shape == (2, gists)


@torch.no_grad()
def test_texts_do_not_see_each_other():
    net, embeddings = trained_gistnet(), texts(2, 3 * K)
    changed = embeddings.clone()
    changed[1] += 1
    first, second = (HistoryBuffers.encode(net, e).gists for e in (embeddings, changed))
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1], atol=1e-2)


@torch.no_grad()
def test_features_are_read_in_place_of_embeddings():
    net = trained_gistnet(feature_layers=1)
    embeddings, features = texts(2, 6 * K), texts(2, 6 * K, seed=5)
    buffers = HistoryBuffers.encode(net, embeddings, levels=2, features=features)
    assert buffers.embeddings is embeddings
    known = HistoryBuffers.encode(trained_gistnet(), features, levels=2)
    assert torch.equal(buffers.gists, known.gists)
    with pytest.raises(InputError, match="states after 1 layers: give the features"):
        HistoryBuffers.encode(net, embeddings)
    with pytest.raises(InputError, match=r"features have shape \(2, 4, 16\), expected .* \(2, 24"):
        HistoryBuffers.encode(net, embeddings, features=features[:, :K])


def test_gradients_reach_every_weight_that_takes_part():
    net = trained_gistnet(pooling="slots")
    buffers = HistoryBuffers.encode(net, texts(2, K * K), levels=2)
    # Level 2 alone: through it to level 1.
    (buffers.gists[:, -1].sum() + buffers.fidelity[:, -1].sum()).backward()
    for name, parameter in net.encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_parents_and_offsets():
    buffers = HistoryBuffers.encode(trained_gistnet(), texts(1, 6 * K), levels=2)
    assert buffers.parents(0).tolist() == [token // K for token in range(6 * K)]
    assert buffers.parents(1).tolist() == [0, 0, 0, 0, 1, 1]
    assert buffers.offsets(0).tolist() == list(range(6 * K))
    assert buffers.offsets(1).tolist() == [0, 4, 8, 12, 16, 20]
    assert buffers.offsets(2).tolist() == [0]


@pytest.mark.parametrize(
    ("tokens", "levels", "message"),
    [(K + 1, 1, "5 tokens and 1 levels: expected a multiple of 4"), (K, 0, "and 0 levels"),
     (K, 3, "and 3 levels")],
)  # fmt: skip
def test_what_has_no_gists_is_refused(tokens, levels, message):
    with pytest.raises(InputError, match=message):
        HistoryBuffers.encode(trained_gistnet(), texts(1, tokens), levels=levels)
