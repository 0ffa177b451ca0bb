"""What the base reads of a working context, against a loop over its entries."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, config, learned_gistnet, new_engine, words

from megacontext.errors import ConfigError


def reader_kinds():
    return pytest.mark.parametrize(("reader", "slots"), [("embedding", 1), ("kv", 1), ("kv", 3)])


def mixed_engine(base, folder, reader, slots, positions):
    """A window with gists of two levels between raw blocks."""
    net = learned_gistnet(base, reader=reader, slots=slots)
    settings = config(budget=250, positions=positions)
    engine = new_engine(folder, base, gistnet=net, config=settings)
    engine.ingest(words(K * K * 2 + 3 * K + 5))
    engine.focus.context = engine.context.reveal(5).check()
    return engine


def slow_reading(engine, pending, ahead=0):
    """Rows and gists, one entry after the other, as ``(position, vector or keys and values)``."""
    context, base, net, memory = engine.context, engine.base, engine.gistnet, engine.memory
    slots = net.cost
    last = base.max_positions - len(pending) - ahead
    shift = max(0, context.cursor - last)
    rows, gists, packed = [], [], 0
    spans = context.spans().tolist()
    if engine.config.positions == "gists_first":
        spans.sort(key=lambda span: span[0] == 0)
    for level, start, end in spans:
        position = packed
        if engine.config.positions == "timeline":
            position = max(packed, start - shift)
        if level == 0:
            for token in range(start, end):
                vector = base.embed(memory.tokens(token, token + 1).long())[0]
                rows.append((position + token - start, vector))
            packed += end - start
            at = position + end - start
            continue
        index = start // K**level
        gist = memory.gists(level, index, index + 1).float()
        with torch.no_grad():
            if net.config.reader == "kv":
                keys, values = net.read_kv(gist, torch.tensor([level]))
                gists.extend(
                    (position + slot, keys[:, 0, slot], values[:, 0, slot]) for slot in range(slots)
                )
            else:
                vector = net.read_embeddings(gist, torch.tensor([level]))[0, 0]
                rows.append((position, vector))
        packed += slots
        at = position + slots
    for token in pending.tolist():
        rows.append((at, base.embed(torch.tensor([token]))[0]))
        at += 1
    return rows, gists


@reader_kinds()
@pytest.mark.parametrize("positions", ["gists_first", "packed", "timeline"])
@pytest.mark.parametrize("ahead", [0, 20])
def test_reading_equals_the_loop(base, reader, slots, positions, ahead, tmp_path):
    engine = mixed_engine(base, tmp_path, reader, slots, positions)
    levels = set(engine.context.levels.tolist())
    assert levels == {0, 1, 2}
    pending = base.encode("who?")
    reading = engine.reader.read(engine.context, pending, ahead=ahead)
    rows, gists = slow_reading(engine, pending, ahead)
    assert reading.positions.tolist() == [position for position, _ in rows]
    assert torch.equal(reading.embeddings, torch.stack([vector for _, vector in rows]))
    assert reading.n_gists == len(gists)
    if gists:
        assert reading.gist_positions.tolist() == [position for position, _, _ in gists]
        keys = torch.stack([key for _, key, _ in gists], dim=1)
        values = torch.stack([value for _, _, value in gists], dim=1)
        torch.testing.assert_close(reading.gist_keys, keys, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(reading.gist_values, values, rtol=1e-5, atol=1e-6)
    assert int(reading.positions.max()) < base.max_positions - ahead


def test_no_history(base, tmp_path):
    engine = new_engine(tmp_path, base)
    ids = base.encode("only a prompt")
    reading = engine.reader.read(engine.context, ids)
    assert torch.equal(reading.embeddings, base.embed(ids))
    assert reading.positions.tolist() == list(range(len(ids)))


def test_more_than_the_base_has_positions_for(base, tmp_path):
    engine = new_engine(tmp_path, base)
    engine.ingest(words(150))
    with pytest.raises(ConfigError, match="positions"):
        engine.reader.read(engine.context, base.encode("x" * 107))
    with pytest.raises(ConfigError, match="positions"):
        engine.reader.read(engine.context, base.encode("x"), ahead=106)
