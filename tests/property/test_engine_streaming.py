"""A long history streams through an engine; every invariant holds at every refocus."""

from __future__ import annotations

import random

import pytest
import torch
from engine_cases import K, check_window, config, new_engine
from tiny_models import tiny_base_model

from megacontext.runtime.focus_policies import LexicalPolicy
from megacontext.runtime.focus_scores import FocusScores

TOKENS = 50_000


class RandomPolicy:
    """Seeded nonsense: signed scores for every entry, proposals anywhere."""

    name = "random"

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def score(self, view):
        n, blocks = len(view.context), view.context.cursor // K
        draw = torch.randn(n, generator=self._generator)
        proposed = torch.randint(0, blocks, (min(6, blocks),), generator=self._generator)
        worth = 3 * torch.rand(len(proposed), generator=self._generator)
        return FocusScores(proposed, worth, draw.clamp(max=0.5), draw.clamp(min=0))


def prose(n_bytes: int, seed: int) -> str:
    """Zipf's law over made-up words, so that some are rare enough to be searched for."""
    draw = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    lexicon = ["".join(draw.choices(letters, k=draw.randint(3, 8))) for _ in range(2000)]
    weights = [1 / rank for rank in range(1, len(lexicon) + 1)]
    return " ".join(draw.choices(lexicon, weights, k=n_bytes // 4))[:n_bytes]


@pytest.mark.parametrize("policy", [LexicalPolicy(), RandomPolicy(3)], ids=lambda p: p.name)
def test_every_refocus_of_a_long_stream_is_legal(policy, tmp_path):
    base = tiny_base_model(max_positions=1024)
    settings = config(budget=512, tail_tokens=64, query_tokens=64)
    engine = new_engine(tmp_path, base, policy=policy, config=settings)
    edits, kinds, levels = 0, set(), set()
    for number, record in enumerate(engine.stream(prose(TOKENS, seed=5)), start=1):
        spans = [tuple(span) for span in record.spans.tolist()]
        assert record.cursor == number * K
        assert record.cost == sum(
            end - start if level == 0 else engine.context.gist_cost for level, start, end in spans
        )
        check_window(engine.context, spans, record.cursor)
        assert record.cost <= settings.budget - K, "room for the next block"
        edits += len(record.edits)
        kinds |= {(edit.kind, edit.reason) for edit in record.edits}
        levels |= {level for level, _, _ in spans}
    assert number == TOKENS // K
    assert engine.memory.n_tokens == engine.context.cursor == TOKENS
    assert levels >= {0, 1, 2}
    assert {kind for kind, _ in kinds} == {"expand", "collapse"}
    assert edits > number
    assert engine.memory.verify().ok
