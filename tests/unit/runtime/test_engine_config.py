"""What a session may be configured to, and how many entries its gists are read as."""

from __future__ import annotations

import pytest
import torch
from engine_cases import config, learned_gistnet, new_engine, words
from tiny_models import tiny_base_model

from megacontext.errors import ConfigError
from megacontext.runtime.engine import EngineConfig


@pytest.mark.parametrize("tail", [192, 500])
def test_a_tail_that_fills_the_budget_is_refused(tail):
    with pytest.raises(ConfigError, match=f"tail_tokens is {tail}, expected less than budget"):
        config(tail_tokens=tail)


@pytest.mark.parametrize("reader", ["kv", "embedding"])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_gists_cost_and_are_read_as_so_many_entries(tmp_path, reader, slots):
    base = tiny_base_model(max_positions=256)
    net = learned_gistnet(base, reader=reader, slots=3)
    engine = new_engine(tmp_path, base, gistnet=net, config=config(gist_slots=slots))
    engine.ingest(words(640))
    context = engine.context
    gists = int((context.levels > 0).sum())
    raw = int(context.widths[context.levels == 0].sum())
    assert gists
    assert context.cost == gists * slots + raw
    reading = engine.reader.read(context, torch.empty(0, dtype=torch.int64))
    assert len(reading) == context.cost
    if reader == "kv":
        keys, _ = net.read_kv(engine.reader.gists(context), context.levels[context.levels > 0])
        torch.testing.assert_close(
            reading.gist_keys.unflatten(1, (gists, slots)), keys[:, :, :slots]
        )


def test_no_more_entries_than_the_gistnet_gives(tmp_path):
    base = tiny_base_model(max_positions=256)
    net = learned_gistnet(base, slots=2)
    with pytest.raises(ConfigError, match="gist_slots is 3, the GistNet's gists have 2"):
        new_engine(tmp_path, base, gistnet=net, config=config(gist_slots=3))


def test_all_entries_by_default(tmp_path):
    base = tiny_base_model(max_positions=256)
    engine = new_engine(tmp_path, base, gistnet=learned_gistnet(base, slots=2))
    assert EngineConfig().gist_slots is None
    assert engine.context.gist_cost == 2
