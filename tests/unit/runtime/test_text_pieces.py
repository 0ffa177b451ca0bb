from __future__ import annotations

import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from megacontext.runtime.text_pieces import text_pieces

# White space of all kinds, separators that only Python counts as such, marks, and plain text.
SYMBOLS = ["a", "B", "é", "e\u0301", "你", "7", ".", "!", "'s", " ", "  ", "\t", "\n", "\n\n",
           "\r\n", "\x0b", "\x1c", "\x85", "\u00a0", "\u2028", "\u3000", "\U0001f600"]  # fmt: skip
TEXTS = st.lists(st.sampled_from(SYMBOLS), max_size=60).map("".join)
SIZES = st.integers(1, 12)
# The way in which Llama 3, Qwen and SmolLM split: line breaks cling to punctuation before them.
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def trained(splitter):
    """A tokenizer that merges whatever its splitter leaves together."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    texts = ["".join(rng.choices(SYMBOLS, k=60)) for _ in range(200)]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


TOKENIZERS = {name: trained(splitter) for name, splitter in SPLITTERS.items()}


def ids(tokenizer, text):
    return tokenizer.encode(text).ids


@given(text=TEXTS | st.text(max_size=80), size=SIZES)
def test_pieces_together_are_the_text(text, size):
    pieces = list(text_pieces(text, size))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 2 * size for piece in pieces)
    assert all(len(piece) >= size for piece in pieces[:-1])


@given(parts=st.lists(TEXTS, max_size=12), size=SIZES)
def test_a_stream_is_cut_as_the_whole_text(parts, size):
    assert list(text_pieces(iter(parts), size)) == list(text_pieces("".join(parts), size))


@pytest.mark.parametrize("name", SPLITTERS)
@settings(max_examples=100)
@given(text=TEXTS, size=SIZES)
@example(text="aaaa.\naaaa", size=4)
@example(text="aaaa!\x1caaa", size=4)
@example(text="aaaa\naaaaaa", size=3)
@example(text="aaaa  \n aaaaaa", size=3)
def test_cuts_at_white_space_change_no_token(name, text, size):
    tokenizer = TOKENIZERS[name]
    pieces = list(text_pieces(text, size))
    # A piece of full length may have been cut within a word.
    if all(len(piece) < 2 * size for piece in pieces[:-1]):
        together = [token for piece in pieces for token in ids(tokenizer, piece)]
        assert together == ids(tokenizer, text)


def test_the_tokenizers_would_notice_a_wrong_cut():
    assert ids(TOKENIZERS["llama"], ".\n") != [
        *ids(TOKENIZERS["llama"], "."),
        *ids(TOKENIZERS["llama"], "\n"),
    ]
    assert ids(TOKENIZERS["gpt2"], "!\x1c") != [
        *ids(TOKENIZERS["gpt2"], "!"),
        *ids(TOKENIZERS["gpt2"], "\x1c"),
    ]


def test_running_text_is_cut_before_spaces_only():
    text = "The cat sat on the mat.\nIt purred; nobody minded. " * 50
    pieces = list(text_pieces(text, 40))
    assert len(pieces) > 30
    assert all(piece.startswith(" ") for piece in pieces[1:])
    assert max(map(len, pieces)) < 60


def test_without_white_space_pieces_have_twice_the_size():
    assert list(text_pieces("x" * 50, 10)) == ["x" * 20, "x" * 20, "x" * 10]
    assert list(text_pieces("", 10)) == []
    assert list(text_pieces([], 10)) == []
    assert list(text_pieces(["", "a", ""], 10)) == ["a"]
