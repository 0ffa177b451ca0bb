"""Cuts long texts into pieces that can be tokenized one by one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

PIECE_CHARACTERS = 65_536


def text_pieces(text: str | Iterable[str], size: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cuts a text, or a stream of texts, into pieces of about ``size`` characters.

    A cut falls just before white space that follows a visible character, where byte-level BPE never
    merges across (some tokenizers do join a line break to punctuation before it: no cut there), so
    the tokens do not depend on where the stream was cut; only a stretch of ``size`` characters
    without such a place is cut within a word.
    """
    rest = ""
    for part in (text,) if isinstance(text, str) else text:
        rest += part
        start = 0
        while len(rest) - start > 2 * size:
            cut = _cut(rest, start + size, start + 2 * size)
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


def _cut(text: str, low: int, high: int) -> int:
    for index in range(low, high):
        if _parts(text[index - 1], text[index]):
            return index
    return high


def _parts(left: str, right: str) -> bool:
    # str.isspace also counts the control characters U+001C to U+001F, tokenizers do not.
    if left.isspace() or not right.isspace() or "\x1c" <= right <= "\x1f":
        return False
    return right not in "\r\n" or left.isalnum()
