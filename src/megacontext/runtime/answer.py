"""An answer in the making: its tokens, its text, and what may still turn out the stop text."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megacontext.runtime.base_model import BaseModel

# A character has four bytes at most, so a token is settled once three have followed it.
_OPEN_TOKENS = 3


@dataclass(frozen=True)
class DecodedToken:
    """One token of an answer.

    Attributes:
        id: the token.
        text: what it adds to the text; empty where a later token completes the character.
        index: its place in the stream: tokens of history and prompt before it.
        round: the refocus whose working context it was written from.
    """

    id: int
    text: str
    index: int
    round: int


@dataclass(frozen=True)
class Looks:
    """What the focus looks for while an answer is written.

    Attributes:
        query: ``[q]`` int64; ``None``: the newest tokens.
        again: text behind which it looks again; empty for none.
    """

    query: Tensor | None
    again: str

    def behind(self, said: Tensor) -> Tensor | None:
        """The query behind an answer of tokens ``said [a]`` so far."""
        return None if self.query is None else torch.cat((self.query, said))

    def after(self, base: BaseModel, said: Tensor) -> bool:
        """Whether to look again behind an answer of tokens ``said [a]`` so far."""
        if not self.again:
            return False
        # A token holds a byte or more: the text is not made of more tokens than it has bytes.
        newest = said[-len(self.again.encode()) :]
        return base.decode(newest).endswith(self.again)


class Answer:
    """Turns token ids into text one by one, and ends it at a stop text.

    Tokens whose text may turn out to begin the stop text, and those of a character that is not
    complete, are held until that is known. So nothing of the stop text is ever given out, and the
    texts joined are the text of the tokens. The cost of a token does not grow with the answer.

    Args:
        base: its tokenizer.
        prompt: ``[p]`` int64, the tokens said before.
        start: place of the first prompt token in the stream.
        stop: text at which the answer ends; none if empty.
    """

    def __init__(self, base: BaseModel, prompt: Tensor, start: int, stop: str) -> None:
        self._base = base
        self._start = start
        self._stop = stop
        self._said = prompt.clone()
        self._n_said = len(prompt)
        self._read: list[int] = []  # ids whose text is out already: context for the next ones
        self._unread: list[int] = []
        self._held: list[DecodedToken] = []
        self.stopped = False

    @property
    def said(self) -> Tensor:
        """``[p + a]`` int64: the prompt and the answer so far, held tokens included."""
        return self._said[: self._n_said]

    @property
    def released(self) -> Tensor:
        """``[p + r]`` int64: the prompt and the tokens given out."""
        return self._said[: self._n_said - len(self._held)]

    @property
    def certain(self) -> Tensor:
        """``[p + c]`` int64: the prompt and the tokens that belong to the answer in any case."""
        return self.released if self._stop else self.said

    def push(self, token: int, round_: int) -> list[DecodedToken]:
        """Takes in the next token and gives out what is known to belong to the answer.

        Args:
            token: its id.
            round_: the refocus it was written from.
        """
        if self._n_said == len(self._said):
            grown = torch.zeros(2 * self._n_said + 64, dtype=torch.int64)
            grown[: self._n_said] = self._said
            self._said = grown
        self._said[self._n_said] = token
        self._held.append(DecodedToken(token, "", self._start + self._n_said, round_))
        self._n_said += 1
        self._unread.append(token)
        text = self._text_of(self._unread)
        if not text.endswith("\ufffd"):
            self._settle(len(self._unread), text)
        elif len(self._unread) > _OPEN_TOKENS:
            self._settle(1, self._text_of(self._unread[:1]))
        return self._release()

    def finish(self) -> list[DecodedToken]:
        """Gives out what is held, since the answer ends without the stop text."""
        if self._unread:
            self._settle(len(self._unread), self._text_of(self._unread))
        released, self._held = self._held, []
        return released

    def _text_of(self, tokens: list[int]) -> str:
        """What the oldest unread tokens add to the text."""
        # Decoded behind tokens before them, since some tokenizers drop a leading space.
        return self._base.decode(self._read + tokens)[len(self._base.decode(self._read)) :]

    def _settle(self, count: int, text: str) -> None:
        """Gives the oldest unread tokens their text: the last of them carries it."""
        last = len(self._held) - len(self._unread) + count - 1
        self._held[last] = replace(self._held[last], text=text)
        self._read = (self._read + self._unread[:count])[-2 * _OPEN_TOKENS :]
        self._unread = self._unread[count:]

    def _release(self) -> list[DecodedToken]:
        text = "".join(token.text for token in self._held)
        found = text.find(self._stop) if self._stop else -1
        if found >= 0:
            return self._end_at(found)
        safe = len(text) - _overlap(text, self._stop)
        count = end = 0
        for number, token in enumerate(self._held, start=1):
            end += len(token.text)
            if token.text and end <= safe:
                count = number
        released, self._held = self._held[:count], self._held[count:]
        return released

    def _end_at(self, length: int) -> list[DecodedToken]:
        """Ends the answer after ``length`` characters of the held text."""
        kept: list[DecodedToken] = []
        for token in self._held:
            if length <= 0:
                break
            text = token.text[:length]
            length -= len(text)
            kept.append(replace(token, text=text))
        self._n_said -= len(self._held) - len(kept)
        self._held = []
        self.stopped = True
        return kept


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
