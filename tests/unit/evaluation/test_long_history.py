from __future__ import annotations

import pytest
from engine_cases import contents, learned_gistnet, new_engine, words
from tiny_models import tiny_base_model

from megacontext.errors import InputError, MemoryExistsError
from megacontext.evaluation.long_history import remember
from megacontext.memory import Memory


@pytest.mark.parametrize("learned", [False, True])
def test_a_history_is_remembered_as_its_text_would_be(tmp_path, learned):
    base = tiny_base_model(max_positions=256)
    gistnet = learned_gistnet(base) if learned else None
    text = words(1100)
    engine = new_engine(tmp_path, base, name="text", gistnet=gistnet)
    engine.ingest(text)
    with remember(base, gistnet, None, base.encode(text), tmp_path / "ids.mctx") as memory:
        assert memory.n_tokens == 1100
        assert contents(memory) == contents(engine.memory)
    engine.memory.close()


def test_what_cannot_be_remembered_leaves_the_memory_closed(tmp_path):
    base = tiny_base_model()
    tokens = base.encode(words(64))
    tokens[40] = -1
    with pytest.raises((InputError, IndexError)):
        remember(base, None, None, tokens, tmp_path / "bad.mctx")
    with Memory.open(tmp_path / "bad.mctx", mode="a") as memory:
        assert memory.n_tokens == 0
    with pytest.raises(MemoryExistsError):
        remember(base, None, None, base.encode("a"), tmp_path / "bad.mctx")
