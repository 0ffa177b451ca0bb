"""Gists and index texts of new tokens, against a plain loop over blocks."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, learned_gistnet, words
from tiny_models import tiny_base_model

from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet, LensNetConfig
from megacontext.memory import Memory
from megacontext.runtime.engine import Engine
from megacontext.runtime.gist_builder import GistBuilder


@pytest.fixture(scope="module")
def base():
    return tiny_base_model()


def empty_memory(folder, base, net, lens=None):
    return Memory.create(folder / "a.mctx", Engine.identity(base, net, lens))


def expected_gists(base, net, ids):
    """Every level, block by block; a level is made from the stored numbers of the one below."""
    levels, children = {}, base.embed(ids)
    while len(children) // K:
        level, made = len(levels) + 1, []
        for first in range(0, len(children) // K * K, K):
            block, context = children[first : first + K], None
            if level == 1 and first and net.encoder is not None:
                reach = net.config.context_tokens
                context = children[max(0, first - reach) : first][None]
            made.append(net.encode(block[None], level, context).vectors.detach().half())
        levels[level] = torch.cat(made)
        children = levels[level].float()
    return levels


@pytest.mark.parametrize("learned", [False, True])
def test_gists_of_all_levels(base, learned, tmp_path):
    net = learned_gistnet(base) if learned else GistNet.untrained(base.d_model)
    ids = base.encode(words(1100))
    built = GistBuilder(base, net).build(empty_memory(tmp_path, base, net), ids)
    expected = expected_gists(base, net, ids)
    assert sorted(built.gists) == sorted(expected) == [1, 2]
    for level, gists in expected.items():
        assert built.gists[level].dtype == torch.float16
        assert len(built.fidelity[level]) == len(gists)
        torch.testing.assert_close(built.gists[level], gists, rtol=2e-3, atol=2e-3)
    assert not built.keys


def test_only_what_new_tokens_complete(base, tmp_path):
    net = GistNet.untrained(base.d_model)
    builder = GistBuilder(base, net)
    memory = empty_memory(tmp_path, base, net)
    ids = base.encode(words(K * K))
    for first, last, counts in (
        (0, 31, {}),
        (31, 32, {1: 1}),
        (32, 40, {}),
        (40, K * K - 1, {1: 30}),
        (K * K - 1, K * K, {1: 1, 2: 1}),
    ):
        built = builder.build(memory, ids[first:last])
        assert {level: len(gists) for level, gists in built.gists.items()} == counts
        assert len(built.block_texts) == counts.get(1, 0)
        memory.append(ids[first:last], built.gists, {}, built.fidelity, built.block_texts)


def test_a_blocks_text_begins_a_little_before_it(base, tmp_path):
    net = GistNet.untrained(base.d_model)
    builder = GistBuilder(base, net)
    memory = empty_memory(tmp_path, base, net)
    text = words(130)
    texts = []
    for first, last in ((0, 50), (50, 70), (70, 130)):
        built = builder.build(memory, base.encode(text[first:last]))
        texts += built.block_texts
        memory.append(
            base.encode(text[first:last]), built.gists, {}, built.fidelity, built.block_texts
        )
    assert texts == [text[max(0, i * K - 8) : (i + 1) * K] for i in range(4)]


def test_keys_come_from_the_lens(base, tmp_path):
    net = GistNet.untrained(base.d_model)
    lens = LensNet(LensNetConfig(d_model=base.d_model, key_width=16)).eval()
    built = GistBuilder(base, net, lens).build(
        empty_memory(tmp_path, base, net, lens), base.encode(words(1100))
    )
    for level, gists in built.gists.items():
        with torch.no_grad():
            keys = lens.encode_keys(gists, torch.full((len(gists),), level))
        assert torch.equal(built.keys[level], keys)


def test_keys_of_blocks_know_their_tokens_and_the_end_of_the_block_before(base, tmp_path):
    net = GistNet.untrained(base.d_model)
    config = LensNetConfig(d_model=base.d_model, key_width=16, key_vocabulary=base.vocab_size)
    lens = LensNet(config).eval()
    tokens = base.encode(words(200))
    memory = empty_memory(tmp_path, base, net, lens)
    built = GistBuilder(base, net, lens).build(memory, tokens)
    for index in (0, 1, len(built.keys[1]) - 1):
        told = tokens[max(0, index * 32 - 8) : index * 32 + 32]
        with torch.no_grad():
            key = lens.encode_keys(built.gists[1][index][None], torch.ones(1).long(), told[None])
        torch.testing.assert_close(built.keys[1][index], key[0])
