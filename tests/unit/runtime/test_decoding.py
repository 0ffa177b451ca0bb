"""An answer between its tokens, with logits made up here."""

from __future__ import annotations

import pytest
import torch
from engine_cases import K, new_engine, words
from tiny_models import VOCAB_SIZE

END = 257


@pytest.fixture
def engine(base, tmp_path):
    engine = new_engine(tmp_path, base)
    engine.ingest(words(100))
    return engine


def begin(engine, **options):
    return engine.begin("so? ", **{"remember": False, "max_new_tokens": 70, **options})


def say(decoding, tokens):
    """What is given out while these tokens are the likeliest ones."""
    logits = [torch.zeros(VOCAB_SIZE).index_fill(0, torch.tensor(t), 1.0) for t in tokens]
    return [decoded for row in logits for decoded in decoding.take(row, 7)]


def test_the_focus_looks_again_after_every_block(engine):
    decoding = begin(engine)
    looks = []
    for count in range(70):
        if decoding.due:
            looks.append((count, decoding.fresh))
        say(decoding, [65 + count % 20])
    assert looks == [(0, True), (K, False), (2 * K, False)]


def test_the_focus_looks_again_behind_a_note(engine, base):
    decoding = begin(engine, look_again=". ")
    for text, again in (("I saw.", False), (" ", True), ("N", False), ("o. ", True)):
        say(decoding, base.encode(text).tolist())
        assert decoding.due == decoding.fresh == again
    assert base.decode(decoding.said) == "I saw. No. "


def test_tokens_know_their_place_and_their_round(engine, base):
    decoding = begin(engine)
    tokens = say(decoding, base.encode("yes").tolist())
    assert [(t.text, t.index, t.round) for t in tokens] == [
        (text, 100 + 4 + i, 7) for i, text in enumerate("yes")
    ]
    assert decoding.start == 100
    assert decoding.n_prompt == 4


def test_ends(engine, base):
    letters = base.encode("abc").tolist()
    longest = begin(engine, max_new_tokens=3)
    assert len(say(longest, letters[:2])) == 2
    assert not longest.ended
    assert len(say(longest, letters[2:])) == 1
    assert longest.ended
    own = begin(engine)
    assert len(say(own, [*letters, END])) == 3
    assert own.ended


def test_what_may_begin_the_stop_text_is_held(engine, base):
    letters = base.encode("ab#!").tolist()
    stopped = begin(engine, stop="#!")
    assert [t.text for t in say(stopped, letters[:3])] == ["a", "b"]
    assert say(stopped, letters[3:]) == []
    assert stopped.ended
    for last in (END, letters[0]):
        unstopped = begin(engine, stop="#!", max_new_tokens=4)
        assert [t.text for t in say(unstopped, letters[:3])] == ["a", "b"]
        assert [t.text for t in say(unstopped, [last])] == ["#", "a"][: 1 + (last != END)]
        assert unstopped.ended
