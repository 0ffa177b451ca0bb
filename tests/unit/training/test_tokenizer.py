from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from megacontext.training.lm_batches import END_OF_TEXT
from megacontext.training.tokenizer import as_transformers, train_tokenizer

TEXTS = ["The old fox sat by the old sea. The number of the fox is 4417." * 5] * 20
TOKENIZER = train_tokenizer(TEXTS, 320)


@settings(max_examples=60)
@given(st.text(max_size=60))
def test_any_text_survives(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids, skip_special_tokens=False) == text


def test_digits_are_tokens_of_their_own():
    tokens = TOKENIZER.encode("code 4417, 44").tokens
    assert [token for token in tokens if any(c.isdigit() for c in token)] == list("441744")
    assert not any(c.isdigit() for token in TOKENIZER.get_vocab() for c in token if len(token) > 1)


def test_the_vocabulary_has_all_bytes_the_end_and_words():
    assert TOKENIZER.get_vocab_size() <= 320
    assert TOKENIZER.token_to_id(END_OF_TEXT) == 0
    assert TOKENIZER.encode(" fox").tokens == ["Ġfox"]
    assert len(TOKENIZER.encode("\x00\x01ÿ").ids) == 4


def test_training_gives_the_same_tokenizer_every_time():
    assert train_tokenizer(iter(TEXTS), 320).to_str() == TOKENIZER.to_str()


@pytest.mark.parametrize("text", ["The fox 12.\nQuestion: où?", END_OF_TEXT, " a  b "])
def test_transformers_encodes_the_same(tmp_path, text):
    as_transformers(TOKENIZER, 77).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(text)["input_ids"] == TOKENIZER.encode(text).ids
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.eos_token, loaded.pad_token) == (END_OF_TEXT, END_OF_TEXT)
    assert loaded.model_max_length == 77
