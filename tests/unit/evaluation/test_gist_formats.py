from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.evaluation.gist_formats import nll_by_format
from megacontext.evaluation.substitution import HORIZON, Substitution, measure
from megacontext.gistnet import GistNet
from megacontext.memory import Memory
from megacontext.runtime.engine import Engine
from megacontext.runtime.gist_builder import GistBuilder
from megacontext.runtime.ingest import Ingestor
from megacontext.telemetry import Telemetry


@pytest.fixture(scope="module")
def base():
    return tiny_base_model("qwen3", max_positions=512)


def windows(base, shape, count=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(base.vocab_size, (count, shape.tokens(32)), generator=generator)


def test_the_formats_differ_a_little_and_raw_windows_not_at_all(base):
    net = GistNet.untrained(base.d_model)
    shape = Substitution("gists", (1, 1, 1, 0))
    ids = windows(base, shape)
    nll = nll_by_format(base, net, ids, shape, ("fp16", "int8", "bf16"), batch=2)
    assert {values.shape for values in nll.values()} == {(3, HORIZON)}
    full = measure(base, net, ids, shape, variants=()).nll["gist"]
    assert torch.allclose(nll["fp16"], full, atol=1e-3)
    assert not torch.equal(nll["int8"], nll["fp16"])
    assert float((nll["int8"] - nll["fp16"]).abs().mean()) < 0.01
    raw = nll_by_format(base, net, ids, Substitution("raw", (0,) * 4))
    assert torch.equal(raw["int8"], raw["fp16"])


def test_it_is_what_is_read_from_a_memory(base, tmp_path):
    """Of both levels, and by another road: stored in one and read as rows."""
    net = GistNet.untrained(base.d_model)
    shape = Substitution("both", (2,) * 32 + (1, 1))
    (ids,) = windows(base, shape, 1)
    identity = replace(Engine.identity(base, net), gist_dtype="int8")
    with Memory.create(tmp_path / "m.mctx", identity) as memory:
        builder = GistBuilder(base, net)
        Ingestor(base, builder, memory, Telemetry(), chunk_tokens=4096).append(ids)
        stored = memory.gists(2), memory.gists(1, 32, 34)
    vectors = torch.cat(stored)
    rows = torch.cat((vectors, base.embed(ids[34 * 32 :])))
    states = base.model.model(inputs_embeds=rows[None]).last_hidden_state[0]
    log_probs = base.model.lm_head(states[3 : 3 + HORIZON]).float().log_softmax(-1)
    targets = ids[34 * 32 + 1 : 34 * 32 + 1 + HORIZON]
    expected = -log_probs.gather(1, targets[:, None])[:, 0]
    found = nll_by_format(base, net, ids[None], shape, ("int8",))["int8"][0]
    assert torch.allclose(found, expected, atol=1e-4)
