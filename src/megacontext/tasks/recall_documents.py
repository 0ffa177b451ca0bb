"""Puts themes into documents: statements scattered through prose, questions at every distance."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from megacontext.tasks.documents import Piece, Theme
from megacontext.tasks.fact_themes import FactThemes
from megacontext.tasks.story_world import STORY_KINDS, StoryWorld
from megacontext.tasks.synonym_themes import SynonymThemes
from megacontext.tasks.vocabulary import Split

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+|\n{2,}")
# Characters per token of generated sentences and of prose, for sizing documents before tokenizing.
_CHARS_PER_TOKEN = 3.3
_DENSE_TOKENS = 200
# Shares of stories told to the end before the first question, of those that then have one only,
# and of noise that is cut into fragments.
_TOLD_FIRST = 0.8
_LONE_QUESTION = 0.15
_FRAGMENTED = 0.4
_STORY_WEIGHTS = {
    "qa1": 1.5, "qa2": 6, "qa3": 7, "qa4": 4, "qa5": 6, "qa6": 0.7, "qa7": 0.7, "qa8": 0.7,
    "qa9": 0.7, "qa10": 0.7,
}  # fmt: skip
_MOST_SENTENCES = {"qa1": 14, "qa2": 50, "qa3": 110, "qa4": 7}
# Characters of a story's sentence, alone and with its share of the questions asked on the way, and
# of a question with its answer.
_SENTENCE, _SENTENCE_ASKED, _QUESTION = 32, 85, 95


@dataclass(frozen=True)
class Prose:
    """Running text to take noise and reading matter from."""

    texts: Sequence[str]

    @cached_property
    def _lengths(self) -> list[int]:
        """Characters up to the end of each text; summed once, since slices are drawn by the row."""
        return list(accumulate(map(len, self.texts)))

    def slice(self, rng: random.Random, characters: int) -> str:
        """A random stretch of one text, from the start of a sentence."""
        text = rng.choices(self.texts, cum_weights=self._lengths)[0]
        start = rng.randrange(max(1, len(text) - characters - 400))
        boundary = _SENTENCE_END.search(text, start, start + 400)
        begin = boundary.end() if boundary and start else start
        return text[begin : begin + characters]

    def fragments(self, rng: random.Random, characters: int) -> str:
        """Short stretches of many places, cut anywhere, as in a window tiled from a memory."""
        parts: list[str] = []
        missing = characters
        while missing > 0:
            size = min(missing, rng.randint(60, 240))
            parts.append(self.slice(rng, size + rng.randint(0, 40))[-size:])
            missing -= size
        return "".join(parts)


class RecallDocuments:
    """Draws documents whose questions are answered by statements read before.

    Args:
        rng: the only source of randomness.
        prose: noise to scatter the statements in.
        split: which part of the vocabulary to use.
        story_share: share of documents that tell a story of a simulated world; the others state
            facts.
    """

    def __init__(
        self,
        rng: random.Random,
        prose: Prose,
        split: Split = "train",
        story_share: float = 0.45,
    ) -> None:
        self.rng = rng
        self.story_share = story_share
        self.prose = prose
        self.facts = FactThemes(rng, split)
        self.synonyms = SynonymThemes(rng, split)
        self.stories = StoryWorld(rng, split)

    def draw(self, tokens: int) -> list[Piece]:
        """One document of about ``tokens`` tokens."""
        characters = int(tokens * _CHARS_PER_TOKEN)
        # Short documents are dense: looking back is learned there, finding in the long ones.
        weights = (8, 1, 1) if tokens < _DENSE_TOKENS else (5, 2, 3)
        noise_share = self.rng.choices((0.0, 0.5, 0.85), weights=weights)[0]
        content = max(160, int(characters * (1 - noise_share)))
        themes = self._themes(content)
        noise = ""
        if noise_share:
            cut = self.rng.random() < _FRAGMENTED
            draw = self.prose.fragments if cut else self.prose.slice
            noise = draw(self.rng, max(80, characters - content))
        return self.scatter(themes, noise)

    def copy(self, tokens: int) -> list[Piece]:
        """A random list and its repetition: the quickest way to learn to look back."""
        first, again = self.facts.copy(max(4, tokens // 8))
        return [Piece(first, "statement"), Piece(again, "copy")]

    def scatter(self, themes: Sequence[Theme], noise: str) -> list[Piece]:
        """Spreads the statements over the noise in order, each question after its evidence."""
        timeline: list[tuple[float, int, list[Piece]]] = []
        order = 0
        for theme in themes:
            start = self.rng.random() * 0.4
            end = self.rng.uniform(max(start, 0.5), 0.97)
            times = sorted(self.rng.uniform(start, end) for _ in theme.statements)
            base = order
            facts = theme.facts or [()] * len(times)
            for time, statement, known in zip(times, theme.statements, facts, strict=True):
                piece = Piece(statement, "statement", mark=order, facts=known)
                timeline.append((time, order, [piece]))
                order += 1
            for question in theme.questions:
                earliest = times[question.after - 1] if question.after else 0.0
                latest = 1.0
                if not question.lasting and question.after < len(times):
                    latest = times[question.after]
                asked = self.rng.uniform(earliest, latest)
                mark = base + question.after - 1 if question.after else -1
                timeline.append((asked, order, question.pieces(mark)))
                order += 1
        told = sentences(noise)
        for index, sentence in enumerate(told):
            timeline.append(((index + 0.5) / len(told), -1, [Piece(sentence, "prose")]))
        timeline.sort(key=lambda event: (event[0], event[1]))
        return _spaced([piece for _, _, pieces in timeline for piece in pieces])

    def _themes(self, characters: int) -> list[Theme]:
        drawn = self.rng.random()
        if drawn < self.story_share:
            return [self._story(characters)]
        drawn = (drawn - self.story_share) / (1 - self.story_share)
        if drawn < 0.75:
            return self._mixed_facts(characters)
        if drawn < 0.88:
            count = max(3, min(40, characters // 60))
            return [self.facts.key_list(count, self.rng.choice((3, 4, 5, 6, 6, 6)))]
        return [self.facts.variables(max(2, min(12, characters // 120)), self.rng.randint(1, 4))]

    def _story(self, characters: int) -> Theme:
        kind = self.rng.choices(STORY_KINDS, weights=[_STORY_WEIGHTS[k] for k in STORY_KINDS])[0]
        at_end = 0
        if self.rng.random() < _TOLD_FIRST:
            at_end = 1 if self.rng.random() < _LONE_QUESTION else self.rng.randint(3, 8)
        room = (characters - _QUESTION * at_end) // (_SENTENCE if at_end else _SENTENCE_ASKED)
        longest = min(_MOST_SENTENCES.get(kind, 40), max(6, room))
        shortest = 2 if self.rng.random() < 0.5 else max(2, longest // 2)
        return self.stories.story(kind, self.rng.randint(shortest, longest), at_end)

    def _mixed_facts(self, characters: int) -> list[Theme]:
        draws = [
            self.facts.attributes, self.facts.codes, self.facts.hidings, self.synonyms.theme,
            self.facts.several_codes,
        ]  # fmt: skip
        chosen = self.rng.choices(draws, (3, 3, 3, 4, 1), k=self.rng.randint(1, 3))
        count = max(2, characters // (100 * len(chosen)))
        return [draw(self.rng.randint(max(1, count // 2), min(count, 24))) for draw in chosen]


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with the line breaks behind it."""
    pieces: list[str] = []
    last = 0
    for match in _SENTENCE_END.finditer(text):
        pieces.append(text[last : match.start()] + match.group().rstrip(" "))
        last = match.end()
    pieces.append(text[last:])
    return [piece for piece in pieces if piece.strip()]


def _spaced(pieces: list[Piece]) -> list[Piece]:
    """Separates neighbouring sentences by one space, unless a line break stands there."""
    spaced: list[Piece] = []
    fresh = True
    for piece in pieces:
        text = piece.text if fresh or piece.text[:1] in "\n " else f" {piece.text}"
        text = text.removeprefix("\n") if fresh and spaced else text
        spaced.append(replace(piece, text=text))
        fresh = text.endswith("\n")
    return spaced
