"""Token ids to text, one by one, and the stop text."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_base_model

from megacontext.runtime.answer import Answer

BASE = tiny_base_model()
PROMPT = torch.tensor([1, 2, 3])


def byte_ids(data: bytes) -> list[int]:
    """The tokens of single bytes, valid UTF-8 or not."""
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary = BASE.tokenizer.get_vocab()
    shown = sorted(ByteLevel.alphabet())
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    characters = {byte: chr(byte) for byte in plain}
    characters |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    assert sorted(characters.values()) == shown
    return [vocabulary[characters[byte]] for byte in data]


def run(data: bytes, stop: str = ""):
    """The steps at which tokens came out, then the answer."""
    answer = Answer(BASE, PROMPT, 100, stop)
    steps = []
    for number, token in enumerate(byte_ids(data)):
        steps.append(answer.push(token, number))
        if answer.stopped:
            return steps, answer
    steps.append(answer.finish())
    return steps, answer


def text_of(steps):
    return "".join(token.text for step in steps for token in step)


def test_plain_text_comes_out_at_once():
    steps, answer = run(b"hello")
    assert [[token.text for token in step] for step in steps] == [
        ["h"],
        ["e"],
        ["l"],
        ["l"],
        ["o"],
        [],
    ]
    assert [token.index for step in steps for token in step] == [103, 104, 105, 106, 107]
    assert [token.round for step in steps for token in step] == [0, 1, 2, 3, 4]
    assert answer.said.tolist() == PROMPT.tolist() + byte_ids(b"hello")
    assert answer.released.tolist() == answer.said.tolist() == answer.certain.tolist()


def test_a_split_character_comes_out_whole():
    steps, _ = run("a€b".encode())
    assert [[token.text for token in step] for step in steps] == [
        ["a"],
        [],
        [],
        ["", "", "€"],
        ["b"],
        [],
    ]


def test_what_never_becomes_a_character_comes_out_in_the_end():
    steps, _ = run(b"a\xe2\x82")
    assert text_of(steps) == BASE.decode(byte_ids(b"a\xe2\x82"))


def test_a_long_run_of_bad_bytes_is_not_held_for_long():
    steps, _ = run(b"\xfc" * 50)
    assert text_of(steps) == "\ufffd" * 50
    out = 0
    for number, step in enumerate(steps[:-1], start=1):
        out += len(step)
        assert number - out <= 3


@settings(max_examples=60)
@given(st.lists(st.sampled_from([*"aé€🦓 ".encode(), 0xFC, 0x80, 0xE2]), max_size=40).map(bytes))
def test_joined_texts_are_the_text_of_the_tokens(data):
    steps, answer = run(data)
    ids = [token.id for step in steps for token in step]
    assert ids == byte_ids(data)
    assert answer.said[3:].tolist() == ids
    assert text_of(steps) == BASE.decode(ids)


@settings(max_examples=60)
@given(st.text("abé", max_size=30), st.text("abé", min_size=1, max_size=4))
def test_the_stop_text_never_shows(text, stop):
    steps, answer = run(text.encode(), stop)
    before, found, _ = text.partition(stop)
    assert text_of(steps) == before
    assert answer.stopped == bool(found)
    assert BASE.decode(answer.said[3:]) == before
    shown = ""
    for number, step in enumerate(steps):
        shown += "".join(token.text for token in step)
        decoded = text.encode()[: number + 1].decode(errors="ignore")
        held = len(decoded) - len(shown)
        assert number == len(steps) - 1 or held < len(stop), "held for no reason"


def test_a_token_is_cut_where_the_stop_text_begins():
    from tiny_models import tiny_model
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from megacontext.runtime.base_model import BaseModel

    backend = Tokenizer(models.WordLevel({"yes.\n": 0, "Q": 1, ":no": 2}, unk_token="Q"))
    backend.decoder = decoders.Fuse()
    base = BaseModel(tiny_model("llama"), PreTrainedTokenizerFast(tokenizer_object=backend), "w")
    answer = Answer(base, torch.tensor([2]), 0, "\nQ:")
    assert answer.push(0, 1) == []
    assert answer.push(1, 1) == []
    (token,) = answer.push(2, 1)
    assert (token.id, token.text, token.index) == (0, "yes.", 1)
    assert answer.stopped
    assert answer.said.tolist() == [2, 0]


@pytest.mark.parametrize("length", [0, 1, 200])
def test_any_length(length):
    steps, answer = run(b"x" * length)
    assert text_of(steps) == "x" * length
    assert len(answer.said) == 3 + length
