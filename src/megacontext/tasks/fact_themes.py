"""Generators of planted facts: attributes, codes, key lists, corrections, variables, copies.

Each generator returns a :class:`~megacontext.tasks.documents.Theme`. Questions repeat the words
of the statement about half the time and rephrase it otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from megacontext.tasks.documents import Question, Theme
from megacontext.tasks.vocabulary import Split, Vocabulary

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Attribute:
    """What can be said and asked about somebody; ``{n}`` is the person and ``{v}`` the value."""

    kind: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    corrections: tuple[str, ...]


ATTRIBUTES: tuple[Attribute, ...] = (
    Attribute(
        "city",
        ("{n} lives in {v}.", "{n} has a house in {v}.", "The home of {n} is in {v}.",
         "{n} settled in {v} long ago."),
        ("Where does {n} live?", "In which town is the home of {n}?", "Which city is {n} from?"),
        ("{n} has moved and now lives in {v}.", "{n} now lives in {v}."),
    ),
    Attribute(
        "job",
        ("{n} works as a {v}.", "The job of {n} is {v}.", "{n} earns a living as a {v}.",
         "{n} is a {v} by trade."),
        ("What is the job of {n}?", "What does {n} do for a living?", "What does {n} work as?"),
        ("{n} now works as a {v}.", "{n} gave up the old job and became a {v}."),
    ),
    Attribute(
        "animal",
        ("{n} has a pet {v}.", "{n} keeps a {v} at home.", "The pet of {n} is a {v}."),
        ("What is the pet of {n}?", "Which animal does {n} keep?", "What pet does {n} have?"),
        ("{n} now has a pet {v} instead.", "The pet of {n} is now a {v}."),
    ),
    Attribute(
        "colour",
        ("The favourite colour of {n} is {v}.", "{n} likes {v} more than any other colour.",
         "{n} always dresses in {v}."),
        ("What is the favourite colour of {n}?", "Which colour does {n} like best?"),
        ("The favourite colour of {n} is now {v}.", "{n} now likes {v} best."),
    ),
    Attribute(
        "food",
        ("{n} likes to eat {v}.", "The favourite food of {n} is {v}.", "{n} has {v} for supper."),
        ("What does {n} like to eat?", "What is the favourite food of {n}?"),
        ("{n} now likes to eat {v}.", "The favourite food of {n} is now {v}."),
    ),
    Attribute(
        "instrument",
        ("{n} plays the {v}.", "{n} has learned the {v}.", "{n} is fond of playing the {v}."),
        ("What does {n} play?", "Which instrument does {n} play?"),
        ("{n} now plays the {v}.", "{n} has taken up the {v} instead."),
    ),
    Attribute(
        "place",
        ("{n} sleeps in the {v}.", "{n} can be found in the {v} at night.",
         "The bed of {n} stands in the {v}."),
        ("Where does {n} sleep?", "Where can {n} be found at night?"),
        ("{n} now sleeps in the {v}.", "The bed of {n} now stands in the {v}."),
    ),
)  # fmt: skip

_CODE_STATEMENTS = (
    "The secret code of the {k} is {v}.",
    "The number of the {k} is {v}.",
    "The {k} carries the number {v}.",
    "Remember that the code of the {k} is {v}.",
    "One of the special magic numbers for {k} is: {v}.",
)
_CODE_QUESTIONS = (
    "What is the secret code of the {k}?",
    "What is the number of the {k}?",
    "Which number belongs to the {k}?",
    "What is the special magic number for {k} mentioned in the text?",
)
_CODE_CORRECTIONS = (
    "Correction: the code of the {k} is {v}.",
    "The number of the {k} has changed to {v}.",
)
_SEVERAL_QUESTIONS = (
    "What are all the special magic numbers for {k} mentioned in the text?",
    "Which numbers does the {k} have?",
    "What are all the codes of the {k}?",
)
_HIDING_STATEMENTS = (
    "The {k} is hidden in the {v}.",
    "Somebody has put the {k} into the {v}.",
    "You will find the {k} in the {v}.",
)
_HIDING_QUESTIONS = ("Where is the {k}?", "Where is the {k} hidden?", "Where can one find the {k}?")
_HIDING_CORRECTIONS = ("The {k} has been moved to the {v}.", "The {k} is now in the {v}.")


class FactThemes:
    """Draws themes of planted facts.

    Args:
        rng: the only source of randomness.
        split: which part of the vocabulary to use.
    """

    def __init__(self, rng: random.Random, split: Split = "train") -> None:
        self.rng = rng
        self.vocabulary = Vocabulary(rng, split)

    def attributes(self, count: int) -> Theme:
        """``count`` people, one attribute each; some are corrected later, some asked in vain."""
        people = self.vocabulary.people(count + 1)
        statements: list[str] = []
        questions: list[Question] = []
        for person in people[:count]:
            attribute = self.rng.choice(ATTRIBUTES)
            self._state(
                statements, questions, person, attribute.kind, "attribute",
                attribute.statements, attribute.questions, attribute.corrections,
            )  # fmt: skip
        stranger = self.rng.choice(ATTRIBUTES)
        asked = self.rng.choice(stranger.questions).format(n=people[-1], k=people[-1])
        if self.rng.random() < 0.3:
            questions.append(Question(asked, UNKNOWN, 0, "unknown"))
        return Theme(statements, questions)

    def codes(self, count: int, length: int | None = None) -> Theme:
        """``count`` labelled things, each with a number of ``length`` (or 2 to 7) digits."""
        statements: list[str] = []
        questions: list[Question] = []
        for label in self._labels(count):
            size = length or self.rng.randint(2, 7)
            self._state(
                statements, questions, label, f"digits{size}", "code",
                _CODE_STATEMENTS, _CODE_QUESTIONS, _CODE_CORRECTIONS,
            )  # fmt: skip
        if self.rng.random() < 0.2:
            label = f"{self.vocabulary.word('adjective')} {self.vocabulary.invented_name()}"
            asked = self.rng.choice(_CODE_QUESTIONS).format(k=label)
            questions.append(Question(asked, UNKNOWN, 0, "unknown"))
        return Theme(statements, questions)

    def several_codes(self, count: int) -> Theme:
        """About ``count`` statements: labelled things with one to four numbers each.

        A question asks for all numbers of a thing, in the order in which they were stated.
        """
        statements: list[str] = []
        last: dict[str, tuple[list[int], list[str]]] = {}
        labels = self._labels(max(1, count // 3))
        for _ in range(count):
            label = self.rng.choice(labels)
            places, values = last.get(label, ([], []))
            if len(values) == 4:
                continue
            value = self._value(f"digits{self.rng.randint(3, 7)}")
            statements.append(self.rng.choice(_CODE_STATEMENTS).format(k=label, v=value))
            last[label] = [*places, len(statements) - 1], [*values, value]
        questions: list[Question] = []
        for label, (places, values) in last.items():
            asked = self.rng.choice(_SEVERAL_QUESTIONS).format(k=label)
            answer, after = ", ".join(values), places[-1] + 1
            questions.append(Question(asked, answer, after, "codes", evidence=tuple(places)))
        return Theme(statements, questions)

    def plain(self, count: int) -> Theme:
        """``count`` facts of mixed kinds, none corrected: question i is about statement i.

        One half are numbers of five digits, the rest hiding places and attributes of people.
        """
        statements: list[str] = []
        questions: list[Question] = []
        people = self.vocabulary.people(count)
        for index, label in enumerate(self._labels(count)):
            subject = label
            if index % 2 == 0:
                spec = ("digits5", "code", _CODE_STATEMENTS[:4], _CODE_QUESTIONS[:3])
            elif index % 4 == 1:
                spec = ("place", "hiding", _HIDING_STATEMENTS, _HIDING_QUESTIONS)
            else:
                attribute = self.rng.choice(ATTRIBUTES)
                subject = people[index]
                spec = (attribute.kind, "attribute", attribute.statements, attribute.questions)
            kind, family, says, asks = spec
            value = self._value(kind)
            statements.append(self.rng.choice(says).format(n=subject, k=subject, v=value))
            asked = self.rng.choice(asks).format(n=subject, k=subject)
            questions.append(Question(asked, value, index + 1, family))
        return Theme(statements, questions)

    def hidings(self, count: int) -> Theme:
        """``count`` things, each hidden in a place."""
        statements: list[str] = []
        questions: list[Question] = []
        for label in self._labels(count):
            self._state(
                statements, questions, label, "place", "hiding",
                _HIDING_STATEMENTS, _HIDING_QUESTIONS, _HIDING_CORRECTIONS,
            )  # fmt: skip
        if self.rng.random() < 0.2:
            label = f"{self.vocabulary.word('adjective')} {self.vocabulary.invented_name()}"
            asked = self.rng.choice(_HIDING_QUESTIONS).format(k=label)
            questions.append(Question(asked, UNKNOWN, 0, "unknown"))
        return Theme(statements, questions)

    def key_list(self, count: int, length: int = 6) -> Theme:
        """``count`` lines ``key: number``, asked in any order."""
        keys: set[str] = set()
        while len(keys) < count:
            kind = self.rng.choice(("thing", "animal", "place", "food", "name"))
            key = (
                self.vocabulary.word(kind)
                if self.rng.random() < 0.6
                else self.vocabulary.invented_name().lower()
            )
            if key.lower() not in {known.lower() for known in keys}:
                keys.add(key)
        ordered = sorted(keys)
        self.rng.shuffle(ordered)
        values = [self.vocabulary.digits(length) for _ in ordered]
        separator = self.rng.choice((": ", " = ", " is "))
        statements = [
            f"\nkey {key}{separator}{value}" for key, value in zip(ordered, values, strict=True)
        ]
        questions = [
            Question(f"What is the value of key {key}?", value, index + 1, "key")
            for index, (key, value) in enumerate(zip(ordered, values, strict=True))
        ]
        return Theme(statements, questions)

    def variables(self, chains: int, hops: int) -> Theme:
        """Variable tracking: numbers handed on from one variable to the next."""
        statements: list[str] = []
        questions: list[Question] = []
        taken: set[str] = set()
        for _ in range(chains):
            value = self.vocabulary.digits(5)
            source = value
            first = len(statements)
            for _ in range(self.rng.randint(1, hops)):
                name = self._variable(taken)
                statements.append(f"VAR {name} = {source}.")
                after = len(statements)
                asked = f"What is the value of VAR {name}?"
                chain = tuple(range(after - 1, first - 1, -1))
                questions.append(Question(asked, value, after, "variable", evidence=chain))
                source = f"VAR {name}"
        return Theme(statements, questions)

    def copy(self, words: int) -> tuple[str, str]:
        """A random sequence of words, and itself again."""
        draws: list[Callable[[], str]] = [
            self.vocabulary.invented_name,
            self.vocabulary.label,
            lambda: self.vocabulary.word("animal"),
            lambda: self.vocabulary.digits(self.rng.randint(1, 5)),
            lambda: self.vocabulary.word("city"),
        ]
        sequence = " ".join(self.rng.choice(draws)() for _ in range(words))
        return f"\nList: {sequence}\nList again:", f" {sequence}\n"

    def _labels(self, count: int) -> list[str]:
        labels: set[str] = set()
        while len(labels) < count:
            if self.rng.random() < 0.75:
                labels.add(self.vocabulary.label())
            else:
                labels.add(f"{self.vocabulary.word('thing')} of {self.vocabulary.invented_name()}")
        ordered = sorted(labels)
        self.rng.shuffle(ordered)
        return ordered

    def _variable(self, taken: set[str]) -> str:
        while True:
            name = "".join(self.rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(3))
            if name not in taken:
                taken.add(name)
                return name

    def _value(self, kind: str) -> str:
        if kind.startswith("digits"):
            return self.vocabulary.digits(int(kind.removeprefix("digits")))
        return self.vocabulary.value(kind)

    def _state(
        self,
        statements: list[str],
        questions: list[Question],
        subject: str,
        value_kind: str,
        family: str,
        says: tuple[str, ...],
        asks: tuple[str, ...],
        corrects: tuple[str, ...],
    ) -> None:
        """Appends a fact, its question and, one time in six, a correction with its question."""
        value = self._value(value_kind)
        statements.append(self.rng.choice(says).format(n=subject, k=subject, v=value))
        first = len(statements)
        asked = self.rng.choice(asks).format(n=subject, k=subject)
        if self.rng.random() < 1 / 6:
            former = value
            while value == former:
                value = self._value(value_kind)
            statements.append(self.rng.choice(corrects).format(n=subject, k=subject, v=value))
            first, family = first + 1, "correction"
        questions.append(Question(asked, value, first, family))
        if self.rng.random() < 0.5:
            asked = self.rng.choice(asks).format(n=subject, k=subject)
            questions.append(Question(asked, value, first, family))
