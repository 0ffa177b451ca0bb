from __future__ import annotations

import threading

import pytest
import torch
from tiny_models import tiny_tokenizer

from megacontext.errors import InputError
from megacontext.runtime.read_ahead import _DOCUMENTS_AHEAD, _PIECES_AHEAD, ReadAhead, read_pieces
from megacontext.runtime.tokenization import encode_text

LONG = "word " * 40_000


def joined(pieces) -> torch.Tensor:
    return torch.cat([piece.tokens for piece in pieces])


def test_pieces_are_the_text_and_tell_the_last():
    tokenizer = tiny_tokenizer()
    pieces = list(read_pieces([LONG, "end"], tokenizer))
    assert len(pieces) > 2
    assert [piece.more for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert joined(pieces).tolist() == encode_text(tokenizer, LONG + "end").tolist()
    assert sum(piece.size for piece in pieces) == len(LONG) + 3
    (nothing,) = read_pieces([], tokenizer)
    assert (len(nothing.tokens), nothing.more) == (0, False)


@pytest.mark.parametrize("readers", [1, 3, 8])
def test_documents_come_in_their_order(readers):
    tokenizer = tiny_tokenizer()
    texts = [f"text {number} " * (1 + number % 7 * 1500) for number in range(12)]
    opened = [lambda text=text: [text] for text in texts]
    with ReadAhead(opened, tokenizer, readers=readers) as ahead:
        for text in texts:
            assert joined(ahead.next_document()).tolist() == encode_text(tokenizer, text).tolist()


def test_no_more_is_read_than_may_be_held():
    tokenizer = tiny_tokenizer()
    read = []
    blocked = threading.Event()

    def endless():
        for number in range(1000):
            read.append(number)
            if len(read) == _PIECES_AHEAD:
                blocked.set()
            yield "word " * 20_000

    small = [list for _ in range(3 * _DOCUMENTS_AHEAD)]
    with ReadAhead([endless, *small], tokenizer, readers=2) as ahead:
        assert blocked.wait(10)
        piece = next(ahead.next_document())
        assert len(piece.tokens)
    # Stopped with most of it unread, and no thread is left.
    assert len(read) < 3 * _PIECES_AHEAD
    assert not [t for t in threading.enumerate() if t.name.startswith("megacontext-reader")]


def test_what_reading_raises_comes_in_its_place():
    def broken():
        yield LONG
        raise InputError("torn")

    tokenizer = tiny_tokenizer()
    with ReadAhead([lambda: ["a"], broken, lambda: ["b"]], tokenizer, readers=2) as ahead:
        assert len(list(ahead.next_document())) == 1
        pieces = ahead.next_document()
        assert next(pieces).more
        with pytest.raises(InputError, match="torn"):
            assert all(piece.more for piece in pieces)
