from __future__ import annotations

import torch
from engine_cases import config, contents, new_engine, words

from megacontext.memory import Source

SOURCE = Source(uri="test:words", media_type="text/plain", tags=("a",))


def test_text_and_its_tokens_make_the_same_memory(tmp_path):
    text = words(1500)
    engines = [
        new_engine(tmp_path, name=name, config=config(chunk_tokens=256)) for name in ("text", "ids")
    ]
    by_text, by_tokens = engines
    first = by_text.ingestor.ingest(text, SOURCE)
    sizes: list[int] = []
    second = by_tokens.ingestor.ingest_tokens(by_tokens.base.encode(text), SOURCE, sizes.append)
    assert first == second
    assert sizes == [256] * 5 + [220]
    assert contents(by_text.memory) == contents(by_tokens.memory)
    assert by_text.memory.generation == by_tokens.memory.generation
    for engine in engines:
        engine.memory.close()


def test_no_tokens_make_no_commit(tmp_path):
    engine = new_engine(tmp_path)
    before = engine.memory.generation
    done = engine.ingestor.ingest_tokens(torch.empty(0, dtype=torch.int64))
    assert (done.start, done.end) == (0, 0)
    assert engine.memory.generation == before
    engine.memory.close()
