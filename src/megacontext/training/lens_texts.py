"""Texts to train LensNet on: facts and stories scattered over book noise, asked at the end."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor

from megacontext.tasks.documents import CONCLUSION, QUESTION_TEMPLATE, Question, Theme
from megacontext.tasks.fact_themes import FactThemes
from megacontext.tasks.recall_documents import Prose, sentences
from megacontext.tasks.story_world import StoryWorld
from megacontext.tasks.synonym_themes import SynonymThemes
from megacontext.tasks.vocabulary import Split

_CHARS_PER_TOKEN = 3.3
_STORIES = ("qa1", "qa2", "qa3", "qa5")
# How soon a text has one more story, how many at most, and how many questions one is asked about.
_STORY_SHARE, _STORIES_AT_MOST, _STORY_QUESTIONS = 0.6, 4, 6
_NOTE = re.compile(r"[^.]*\.")
_WORD = re.compile(r"\w+")
_THING = re.compile(r"\bthe (\w+)")


@dataclass(frozen=True, eq=False)
class Ask:
    """One look into a text: what is asked, what follows, and where what it needs is told.

    Attributes:
        family: the kind of question.
        question: the question.
        noted: what the model has written down so far, the beginning of its answer.
        target: what it shall write next, up to where it may look again.
        evidence: blocks of the text that hold what it needs for that, ascending; none where
            nothing answers.
        related: other blocks that say something of the same, such as what held before.
    """

    family: str
    question: str
    noted: str
    target: str
    evidence: tuple[int, ...]
    related: tuple[int, ...] = ()

    @property
    def query(self) -> str:
        """What the focus is told to look for."""
        return f"{self.question}{self.noted}"

    @property
    def prompt(self) -> str:
        """What the base model reads behind the text."""
        return f"{QUESTION_TEMPLATE.format(question=self.question)}{self.noted}"


@dataclass(frozen=True, eq=False)
class AskedText:
    """A text and the looks into it.

    Attributes:
        tokens: int64 ``[n]``.
        asks: all of them are about the whole text.
        told: blocks that hold a statement, ascending; the others are noise.
    """

    tokens: Tensor
    asks: tuple[Ask, ...]
    told: tuple[int, ...]


class LensTexts:
    """Draws texts; text ``number`` is a function of the seed and the number alone.

    Args:
        tokenizer: of the base model.
        prose: noise.
        split: which part of the vocabulary to use.
        seed: of all texts.
        block_size: tokens of a block.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prose: Prose,
        split: Split = "train",
        seed: int = 0,
        block_size: int = 32,
    ) -> None:
        self.tokenizer = tokenizer
        self.prose = prose
        self.split: Split = split
        self.seed = seed
        self.block_size = block_size

    def draw(self, number: int, tokens: int, facts: int) -> AskedText:
        """A text of about ``tokens`` tokens with about ``facts`` statements in it."""
        rng = random.Random(f"lens texts/{self.seed}/{self.split}/{number}")
        themes = self._themes(rng, facts)
        pieces, places = _scattered(rng, themes, sentences(self.noise(rng, tokens)))
        encoded = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(pieces)]
        ends = [0]
        for ids in encoded:
            ends.append(ends[-1] + len(ids))

        def blocks(theme: int, statement: int) -> range:
            index, size = places[theme][statement], self.block_size
            return range(ends[index] // size, (ends[index + 1] - 1) // size + 1)

        asks: list[Ask] = []
        told: set[int] = set()
        for index, theme in enumerate(themes):
            own = {b for number in range(len(theme.statements)) for b in blocks(index, number)}
            told |= own
            # A story's other sentences are about the same people and things.
            related = own if theme.facts else set[int]()
            for question in theme.questions:
                asks += _looks(question, lambda at, theme=index: blocks(theme, at), related)
        read = torch.tensor([token for ids in encoded for token in ids], dtype=torch.int64)
        return AskedText(read, tuple(asks), tuple(sorted(told)))

    def noise(self, rng: random.Random, tokens: int) -> str:
        """Prose of about ``tokens`` tokens; of several books where one is too short."""
        parts: list[str] = []
        missing = int(tokens * _CHARS_PER_TOKEN)
        while missing > 0:
            parts.append(self.prose.slice(rng, missing))
            missing -= len(parts[-1]) + 1
        return "\n".join(parts)

    def _themes(self, rng: random.Random, facts: int) -> list[Theme]:
        plain = FactThemes(rng, self.split)
        draws: list[tuple[float, Callable[[int], Theme]]] = [
            (2, plain.attributes), (2, plain.codes), (2, plain.hidings), (1, plain.several_codes),
            (4, SynonymThemes(rng, self.split).theme),
        ]  # fmt: skip
        weights = [weight for weight, _ in draws]
        counts = [0] * len(draws)
        themes: list[Theme] = []
        left = facts
        # One theme of a kind: two could say different things of one subject.
        while left > 0:
            if len(themes) < _STORIES_AT_MOST and rng.random() < _STORY_SHARE:
                kind = rng.choice(_STORIES)
                count = rng.randint(2, 10 if kind == "qa1" else 24)
                story = StoryWorld(rng, self.split).story(kind, count, _STORY_QUESTIONS)
                if not any(_share_names(story, other) for other in themes):
                    themes.append(story)
            else:
                count = rng.randint(1, min(6, left))
                counts[rng.choices(range(len(draws)), weights)[0]] += count
            left -= count
        themes += [draw(count) for (_, draw), count in zip(draws, counts, strict=True) if count]
        return themes


def _share_names(first: Theme, second: Theme) -> bool:
    """Whether a person or a thing that one story is asked about is named in the other."""
    return any(
        not _subjects(one).isdisjoint(_WORD.findall(" ".join(other.statements)))
        for one, other in ((first, second), (second, first))
    )


def _subjects(story: Theme) -> set[str]:
    """The people of a story, who begin its sentences, and the things it is asked about."""
    people = {statement.split()[0] for statement in story.statements}
    things = {found[1] for asked in story.questions if (found := _THING.search(asked.text))}
    return people | things


def _looks(
    question: Question, blocks: Callable[[int], range], related: AbstractSet[int]
) -> list[Ask]:
    """The looks a question needs: one, or one for every sentence of its notes."""

    def ask(family: str, noted: str, target: str, wanted: Sequence[int]) -> Ask:
        where = {block for statement in wanted for block in blocks(statement)}
        return Ask(
            family, question.text, noted, target, tuple(sorted(where)),
            tuple(sorted(related - where)),
        )  # fmt: skip

    needed = question.needed
    if not question.notes:
        return [ask(question.family, "", f" {question.answer}\n", needed)]
    notes = [f" {match.group().strip()}" for match in _NOTE.finditer(question.notes)]
    found: list[Ask] = []
    for step, note in enumerate(notes):
        # What the steps do not say themselves is needed from the first one on.
        wanted = [needed[step], *(needed[len(notes) :] if step == 0 else ())]
        target = note if step + 1 < len(notes) else f"{note}{CONCLUSION} {question.answer}\n"
        found.append(ask(f"{question.family}.{step + 1}", "".join(notes[:step]), target, wanted))
    return found


def _scattered(
    rng: random.Random, themes: Sequence[Theme], noise: Sequence[str]
) -> tuple[list[str], list[list[int]]]:
    """Noise with the statements between its sentences, each theme's in order.

    Returns:
        The pieces of the text, and for every theme the indices of its statements' pieces.
    """
    timeline: list[tuple[float, int, int, str]] = [
        ((index + 0.5) / len(noise), -1, -1, text) for index, text in enumerate(noise)
    ]
    for number, theme in enumerate(themes):
        times = sorted(rng.random() for _ in theme.statements)
        timeline += [
            (time, number, index, statement)
            for index, (time, statement) in enumerate(zip(times, theme.statements, strict=True))
        ]
    timeline.sort(key=lambda event: event[:3])
    places: list[list[int]] = [[0] * len(theme.statements) for theme in themes]
    pieces: list[str] = []
    for _, number, index, text in timeline:
        if number >= 0:
            places[number][index] = len(pieces)
        fresh = not pieces or pieces[-1].endswith("\n") or text[:1] in "\n "
        pieces.append(text if fresh else f" {text}")
    return pieces, places
