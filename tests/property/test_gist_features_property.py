"""However a text is cut into commits: gists of the base's first layers are the same."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from engine_cases import K, contents, learned_gistnet, words
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_base_model

from megacontext.memory import Memory
from megacontext.runtime.engine import Engine
from megacontext.runtime.gist_builder import GistBuilder

BASES = {name: tiny_base_model(name, max_positions=256) for name in ("qwen3", "gemma2")}
TOKENS = 11 * K + 7


def built(base, net, ids, cuts):
    """What a memory holds after a commit up to every cut."""
    with tempfile.TemporaryDirectory() as folder:
        memory = Memory.create(Path(folder) / "a.mctx", Engine.identity(base, net))
        builder = GistBuilder(base, net)
        with memory:
            for start, end in zip((0, *cuts), (*cuts, len(ids)), strict=True):
                made = builder.build(memory, ids[start:end])
                memory.append(ids[start:end], made.gists, {}, made.fidelity, made.block_texts)
            return contents(memory)


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(sorted(BASES)),
    layers=st.integers(0, 3),
    segment=st.sampled_from([32, 64, 96, 256]),
    seed=st.integers(0, 3),
    cuts=st.sets(st.integers(1, TOKENS - 1), max_size=5),
)
def test_any_cut_into_commits_gives_the_same_gists(name, layers, segment, seed, cuts):
    base = BASES[name]
    net = learned_gistnet(base, seed=seed, feature_layers=layers, feature_segment=segment)
    ids = base.encode(words(TOKENS, seed=seed))
    whole = built(base, net, ids, ())
    assert torch.tensor(whole["gists 1"]).shape[0] == 11
    assert built(base, net, ids, sorted(cuts)) == whole
