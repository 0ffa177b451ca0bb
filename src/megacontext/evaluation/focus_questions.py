"""What suite ``focus`` plants and asks: facts and stories of many kinds that share no names."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from megacontext.evaluation.babi import BabiQuestion, find_babi, read_babi
from megacontext.evaluation.focus_names import OwnNames
from megacontext.tasks.documents import Question, Theme
from megacontext.tasks.fact_themes import FactThemes
from megacontext.tasks.story_world import StoryWorld
from megacontext.tasks.synonym_themes import SynonymThemes

FocusKind = Literal[
    "same_words", "codes", "paraphrase", "corrected", "two_hop", "three_hop", "babi_qa2",
    "babi_qa3", "none",
]  # fmt: skip
FOCUS_KINDS: tuple[FocusKind, ...] = (
    "same_words", "codes", "paraphrase", "corrected", "two_hop", "three_hop", "babi_qa2",
    "babi_qa3", "none",
)  # fmt: skip
BABI_KINDS: dict[FocusKind, str] = {"babi_qa2": "qa2", "babi_qa3": "qa3"}
SEVERAL_LOOKS: frozenset[FocusKind] = frozenset({"two_hop", "three_hop", *BABI_KINDS})
"""Kinds whose answer needs notes: what was found first tells what to look for next."""

_STORY_KINDS: tuple[FocusKind, ...] = ("two_hop", "three_hop")
_STORY_SENTENCES = 12
# Sentences; longer stories of the published files would fill a short history on their own.
_LONGEST_BABI = {"qa2": 12, "qa3": 24}
_BABI_THING = re.compile(r"^Where (?:is|was) the (\w+)(?: before the \w+)?\?$")
_FACTS_PER_DRAW = 4


@dataclass(frozen=True)
class Planted:
    """Statements that belong together, and the questions about them.

    Attributes:
        kind: of the questions.
        statements: in the order in which they are told; none where nothing answers.
        questions: each asked after all statements of the history.
    """

    kind: FocusKind
    statements: tuple[str, ...]
    questions: tuple[Question, ...]


Group = list[Planted]
"""As many questions of every kind as are asked together, and what they are about."""


class Planter:
    """Draws what goes into one history; no two subjects in it share their name.

    Args:
        rng: the only source of randomness.
    """

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.names = OwnNames(rng)
        self._facts = FactThemes(rng, "held_out")
        self._facts.vocabulary = self.names

    def facts(self, count: int) -> tuple[Group, Group]:
        """``count`` hiding places and attributes of people, and as many numbers of five digits."""
        theme = self._facts.plain(2 * count)
        singles = [
            (statement, replace(question, after=1))
            for statement, question in zip(theme.statements, theme.questions, strict=True)
        ]
        numbers = [Planted("codes", (said,), (asked,)) for said, asked in singles[::2]]
        others = [Planted("same_words", (said,), (asked,)) for said, asked in singles[1::2]]
        return others, numbers

    def corrected(self, count: int) -> Group:
        """``count`` facts that are stated twice; the newer statement holds."""
        planted: Group = []
        while len(planted) < count:
            given = self.names.given
            theme = self._some_facts()
            found = {q.after: q for q in theme.questions if q.family == "correction"}
            if not found:
                self.names.return_to(given)
            for after, question in found.items():
                pair = tuple(theme.statements[after - 2 : after])
                planted.append(Planted("corrected", pair, (replace(question, after=2),)))
        return planted[:count]

    def unanswered(self, count: int) -> Group:
        """``count`` questions about somebody or something that no statement names."""
        planted: Group = []
        while len(planted) < count:
            given = self.names.given
            theme = self._some_facts()
            # What else was drawn with it is not planted.
            self.names.return_to(given)
            asked = [question for question in theme.questions if not question.needed]
            planted += [Planted("none", (), (question,)) for question in asked]
        return planted[:count]

    def paraphrases(self, count: int) -> Group:
        """``count`` facts whose questions share no content word with them; draw these last."""
        while True:
            theme = SynonymThemes(self.rng, "held_out").theme(count)
            questions = [question.text for question in theme.questions]
            texts = " ".join((*theme.statements, *questions))
            if not any(label in texts for label in self.names.given.labels):
                break
        return [
            Planted("paraphrase", (statement,), (replace(question, after=1),))
            for statement, question in zip(theme.statements, theme.questions, strict=True)
        ]

    def story(self, kind: FocusKind, most: int) -> Planted:
        """A story in the manner of bAbI with one to ``most`` questions after its end."""
        family, hops = ("qa2", 2) if kind == "two_hop" else ("qa3", 3)
        while True:
            given = self.names.given
            world = StoryWorld(self.rng, "held_out", babi_share=0.0)
            world.vocabulary = self.names
            theme = world.story(family, _STORY_SENTENCES, at_end=6)
            asked = [
                question
                for question in theme.questions
                if question.family == family and len(set(question.needed)) == hops
            ]
            if asked:
                return Planted(kind, tuple(theme.statements), tuple(asked[:most]))
            self.names.return_to(given)

    def babi_story(self, kind: FocusKind, told: BabiQuestion) -> Planted:
        """A published story up to its question, its people and what is asked after renamed."""
        old = [*dict.fromkeys(statement.split()[0] for statement in told.story)]
        new = dict(zip(old, self.names.people(len(old)), strict=True))
        thing = _BABI_THING.match(told.question)
        if thing is not None:
            new[thing[1]] = self.names.thing()
        pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, new))})\b")

        def renamed(text: str) -> str:
            return pattern.sub(lambda match: new[match[0]], text)

        statements = tuple(map(renamed, told.story))
        # Not all models write notes in the same words; the sentences themselves are one way.
        notes = " ".join(statements[index] for index in told.evidence)
        question = Question(
            renamed(told.question), told.answer, len(statements), kind, notes=notes,
            evidence=told.evidence,
        )  # fmt: skip
        return Planted(kind, statements, (question,))

    def _some_facts(self) -> Theme:
        draw = self.rng.choice((self._facts.attributes, self._facts.codes, self._facts.hidings))
        return draw(_FACTS_PER_DRAW)


def group_batches(
    *, groups: int, together: int, asked: int, seed: int, babi: Path | None = None
) -> Iterator[list[Group]]:
    """Groups that may be planted in one history, a batch at a time.

    Args:
        groups: how many in all.
        together: most groups of a batch; no name occurs twice in one.
        asked: questions of every kind in a group.
        seed: of everything; what is planted does not depend on the length of the history.
        babi: folder with the published bAbI v1.1 files; kinds ``babi_…`` are left out without.

    Raises:
        DataError: the bAbI files are not there or damaged.
    """
    stories: dict[FocusKind, Iterator[BabiQuestion]] = {
        kind: _babi_stories(babi, task, seed) for kind, task in BABI_KINDS.items() if babi
    }
    for first in range(0, groups, together):
        count = min(together, groups - first)
        planter = Planter(random.Random(f"focus/{seed}/{first}"))
        batch: list[Group] = [[] for _ in range(count)]
        for group in batch:
            for kind in _STORY_KINDS:
                group.extend(_stories(planter, kind, asked))
            for kind, told in stories.items():
                group.extend(planter.babi_story(kind, one) for one in islice(told, asked))
        singles = (
            *planter.facts(count * asked),
            planter.corrected(count * asked),
            planter.unanswered(count * asked),
            planter.paraphrases(count * asked),
        )
        for planted in singles:
            planter.rng.shuffle(planted)
            for index, group in enumerate(batch):
                group.extend(planted[index::count])
        yield batch


def _stories(planter: Planter, kind: FocusKind, asked: int) -> Group:
    """Stories with ``asked`` questions in all."""
    planted: Group = []
    left = asked
    while left:
        planted.append(planter.story(kind, left))
        left -= len(planted[-1].questions)
    return planted


def _babi_stories(folder: Path, task: str, seed: int) -> Iterator[BabiQuestion]:
    """Test questions after short stories in random order, again from the start after the last."""
    path = find_babi(folder, task)
    short = [
        question
        for question in read_babi(path)
        if len(question.story) <= _LONGEST_BABI[task] and _BABI_THING.match(question.question)
    ]
    return _endless(short, random.Random(f"focus/{task}/{seed}"))


def _endless(questions: Sequence[BabiQuestion], rng: random.Random) -> Iterator[BabiQuestion]:
    while questions:
        yield from rng.sample(questions, len(questions))
