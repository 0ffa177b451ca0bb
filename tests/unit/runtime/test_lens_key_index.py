"""The lens proposes the same blocks whichever way its keys are searched."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, new_engine, words

from megacontext.lensnet import LensNet, LensNetConfig
from megacontext.lensnet.inputs import TailStates
from megacontext.memory import KeyIndexConfig
from megacontext.memory.key_index_file import INDEX_NAME
from megacontext.memory.key_lists import find_faiss
from megacontext.runtime.lens_policy import LensPolicy
from megacontext.runtime.session import Session, SessionConfig

SETTINGS = KeyIndexConfig(flat_keys=16, rerank=1 << 20)


@pytest.mark.parametrize("interaction", ["max", "mean"])
def test_the_most_relevant_blocks_are_proposed(base, tmp_path, interaction):
    lens = LensNet(
        LensNetConfig(
            d_model=base.d_model,
            key_width=16,
            d_hidden=32,
            n_layers=1,
            d_ff=32,
            interaction=interaction,
        )
    ).eval()
    engine = new_engine(tmp_path, base, lens=lens)
    engine.ingest(words(40 * K))
    memory = engine.memory
    for question in ("zebra", "where is the king", "blue"):
        view = engine.focus.view(base.encode(question))
        hidden = base.features(view.query).float()[None]
        tail = TailStates(hidden, torch.ones(hidden.shape[:2], dtype=torch.bool))
        asked = lens.encode_queries(tail.hidden, tail.mask, view.query[None])
        keys = memory.keys(1, 0, view.n_proposable)
        best = lens.relevance(asked, keys)[0].topk(5)
        for policy in (
            LensPolicy(lens, candidates=5),
            LensPolicy(lens, candidates=5, key_index=SETTINGS),
        ):
            blocks, relevance = policy._by_keys(view, tail)
            assert blocks.tolist() == best.indices.tolist()
            torch.testing.assert_close(relevance, best.values)
    assert (memory.path / INDEX_NAME).exists() == (find_faiss() is not None)


def test_a_session_says_when_an_index_is_used():
    config = SessionConfig(policy="lens", key_index=SETTINGS)
    with Session(config) as session:
        policy = session.policy()
    assert isinstance(policy, LensPolicy)
    assert policy._key_config is config.key_index
