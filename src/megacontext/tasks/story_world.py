"""A small simulated world of people, places and things, told in short sentences.

It produces questions of the same kinds as bAbI qa1 to qa10 (Weston et al., 2015, arXiv 1502.05698):
one, two and three supporting facts, two- and three-argument relations, yes/no, counting, lists,
negation and indefinite knowledge. Nothing is read from the bAbI files, which serve evaluation only;
people and places of bAbI's world are among many others that occur here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from megacontext.tasks.documents import Question, Theme
from megacontext.tasks.vocabulary import Split, Vocabulary

_BABI_PEOPLE: tuple[str, ...] = (
    "Mary",
    "John",
    "Daniel",
    "Sandra",
    "Bill",
    "Fred",
    "Jeff",
    "Julie",
)
_BABI_PLACES = (
    "kitchen", "garden", "bathroom", "bedroom", "hallway", "office", "park", "school", "cinema",
)  # fmt: skip
_BABI_THINGS = ("football", "milk", "apple")
_MOVES = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
_GETS = ("got", "picked up", "grabbed", "took")
_DROPS = ("dropped", "discarded", "put down", "left")
_GIVES = ("gave", "handed", "passed")
_OPPOSITES = {"north": "south", "south": "north", "east": "west", "west": "east"}
_OFFSETS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
_NUMBERS = ("none", "one", "two", "three", "four", "five", "six")

STORY_KINDS = ("qa1", "qa2", "qa3", "qa4", "qa5", "qa6", "qa7", "qa8", "qa9", "qa10")


@dataclass
class _Person:
    name: str
    place: str | None = None
    denied: str | None = None
    either: tuple[str, str] | None = None
    holds: list[str] = field(default_factory=list)


@dataclass
class _Gift:
    giver: str
    thing: str
    taker: str


class StoryWorld:
    """Draws stories of one bAbI-like kind.

    Args:
        rng: the only source of randomness.
        split: which part of the vocabulary the people beyond bAbI's come from.
        babi_share: share of stories that use the people, places and things of bAbI's own world.
    """

    def __init__(self, rng: random.Random, split: Split = "train", babi_share: float = 0.6) -> None:
        self.rng = rng
        self.vocabulary = Vocabulary(rng, split)
        self.babi_share = babi_share

    def story(self, kind: str, sentences: int) -> Theme:
        """A story of about ``sentences`` sentences with a question after most of them."""
        if kind == "qa4":
            return self._directions(max(2, min(sentences, 7)))
        return _Story(self.rng, *self._cast(kind), kind).tell(sentences)

    def _cast(self, kind: str) -> tuple[list[str], list[str], list[str]]:
        count = self.rng.randint(2, 4)
        if self.rng.random() < self.babi_share:
            people = self.rng.sample(_BABI_PEOPLE, 4) if count != 3 else list(_BABI_PEOPLE[:4])
            return people, self.rng.sample(_BABI_PLACES, 6), list(_BABI_THINGS)
        return (
            self.vocabulary.people(count),
            self.vocabulary.words("place", 5),
            self.vocabulary.words("thing", 3),
        )

    def _directions(self, sentences: int) -> Theme:
        """Places on a grid, one a cell; each sentence relates a new place to one named before."""
        places = (
            self.rng.sample(_BABI_PLACES[:6], min(6, sentences + 1))
            if self.rng.random() < self.babi_share
            else self.vocabulary.words("place", min(sentences + 1, self.vocabulary.size("place")))
        )
        theme = Theme([])
        cells = {places[0]: (0, 0)}
        for new in places[1:]:
            free = [
                (known, direction, cell)
                for known, (x, y) in cells.items()
                for direction, (dx, dy) in _OFFSETS.items()
                if (cell := (x + dx, y + dy)) not in cells.values()
            ]
            known, direction, cells[new] = self.rng.choice(free)
            back = _OPPOSITES[direction]
            if self.rng.random() < 0.5:
                theme.statements.append(f"The {new} is {direction} of the {known}.")
            else:
                theme.statements.append(f"The {known} is {back} of the {new}.")
            after = len(theme.statements)
            asked = [
                (f"What is {direction} of the {known}?", new),
                (f"What is {back} of the {new}?", known),
                (f"What is the {new} {direction} of?", known),
                (f"What is the {known} {back} of?", new),
            ]
            for text, answer in self.rng.sample(asked, 2):
                theme.questions.append(Question(text, answer, after, "qa4"))
        return theme


class _Story:
    """One telling: the state of the world and the sentences so far."""

    def __init__(
        self, rng: random.Random, people: list[str], places: list[str], things: list[str], kind: str
    ) -> None:
        self.rng = rng
        self.kind = kind
        self.people = {name: _Person(name) for name in people}
        self.places = places
        self.things = things
        self.thing_places: dict[str, list[str]] = {thing: [] for thing in things}
        self.owner: dict[str, str] = {}
        self.gifts: list[_Gift] = []
        self.theme = Theme([])

    def tell(self, sentences: int) -> Theme:
        asks: dict[str, Callable[[], tuple[str, str] | None]] = {
            "qa1": self._ask_place, "qa2": self._ask_thing, "qa3": self._ask_before,
            "qa5": self._ask_gift, "qa6": self._ask_is_in, "qa7": self._ask_count,
            "qa8": self._ask_list, "qa9": self._ask_is_in, "qa10": self._ask_is_in,
        }  # fmt: skip
        while len(self.theme.statements) < sentences:
            self._event()
            if self.rng.random() < 0.5:
                asked = asks[self.kind]()
                if asked is not None:
                    self.theme.questions.append(
                        Question(*asked, len(self.theme.statements), self.kind, lasting=False)
                    )
        return self.theme

    def _say(self, sentence: str) -> None:
        self.theme.statements.append(sentence)

    def _event(self) -> None:
        person = self.people[self.rng.choice(list(self.people))]
        handling = {"qa1": 0.0, "qa6": 0.15, "qa9": 0.0, "qa10": 0.0, "qa5": 0.65}.get(
            self.kind, 0.45
        )
        if self.rng.random() < handling:
            self._handle(person)
        elif self.kind == "qa9" and self.rng.random() < 0.4:
            self._deny(person)
        elif self.kind == "qa10" and self.rng.random() < 0.4:
            self._either(person)
        else:
            self._move(person)

    def _move(self, person: _Person) -> None:
        place = self.rng.choice([p for p in self.places if p != person.place])
        if self.kind in ("qa9", "qa10") and self.rng.random() < 0.5:
            self._say(f"{person.name} is in the {place}.")
        else:
            self._say(f"{person.name} {self.rng.choice(_MOVES)} the {place}.")
        person.place, person.denied, person.either = place, None, None
        for thing in person.holds:
            self._thing_at(thing, place)

    def _deny(self, person: _Person) -> None:
        place = person.place or self.rng.choice(self.places)
        verb = "is no longer" if self.rng.random() < 0.5 else "is not"
        self._say(f"{person.name} {verb} in the {place}.")
        person.place, person.denied = None, place

    def _either(self, person: _Person) -> None:
        first, second = self.rng.sample(self.places, 2)
        self._say(f"{person.name} is either in the {first} or the {second}.")
        person.place, person.either = None, (first, second)

    def _thing_at(self, thing: str, place: str) -> None:
        trail = self.thing_places[thing]
        if not trail or trail[-1] != place:
            trail.append(place)

    def _handle(self, person: _Person) -> None:
        others = [p for p in self.people.values() if p is not person]
        if person.holds and self.kind in ("qa5", "qa7", "qa8") and self.rng.random() < 0.6:
            self._give(person, self.rng.choice(others))
        elif person.holds and self.rng.random() < (0.3 if self.kind == "qa5" else 0.5):
            thing = self.rng.choice(person.holds)
            person.holds.remove(thing)
            del self.owner[thing]
            tail = self.rng.choice((" there", ""))
            self._say(f"{person.name} {self.rng.choice(_DROPS)} the {thing}{tail}.")
        else:
            self._get(person)

    def _get(self, person: _Person) -> None:
        free = [
            thing
            for thing in self.things
            if thing not in self.owner
            and (
                not self.thing_places[thing]
                or person.place is None
                or self.thing_places[thing][-1] == person.place
            )
        ]
        if not free or (person.place is None and self.kind in ("qa2", "qa3")):
            self._move(person)
            return
        thing = self.rng.choice(free)
        person.holds.append(thing)
        self.owner[thing] = person.name
        if person.place is not None:
            self._thing_at(thing, person.place)
        tail = self.rng.choice((" there", ""))
        self._say(f"{person.name} {self.rng.choice(_GETS)} the {thing}{tail}.")

    def _give(self, giver: _Person, taker: _Person) -> None:
        thing = self.rng.choice(giver.holds)
        giver.holds.remove(thing)
        taker.holds.append(thing)
        self.owner[thing] = taker.name
        self.gifts.append(_Gift(giver.name, thing, taker.name))
        verb = self.rng.choice(_GIVES)
        if self.rng.random() < 0.2:
            self._say(f"{giver.name} {verb} {taker.name} the {thing}.")
        else:
            self._say(f"{giver.name} {verb} the {thing} to {taker.name}.")

    def _ask_place(self) -> tuple[str, str] | None:
        known = [p for p in self.people.values() if p.place is not None]
        if not known:
            return None
        person = self.rng.choice(known)
        return f"Where is {person.name}?", str(person.place)

    def _ask_thing(self) -> tuple[str, str] | None:
        known = [thing for thing in self.things if self.thing_places[thing]]
        if not known:
            return None
        thing = self.rng.choice(known)
        return f"Where is the {thing}?", self.thing_places[thing][-1]

    def _ask_before(self) -> tuple[str, str] | None:
        known = [thing for thing in self.things if len(self.thing_places[thing]) > 1]
        if not known:
            return self._ask_thing()
        thing = self.rng.choice(known)
        trail = self.thing_places[thing]
        index = len(trail) - self.rng.randint(1, min(3, len(trail) - 1))
        last = max(i for i, place in enumerate(trail) if place == trail[index])
        return f"Where was the {thing} before the {trail[last]}?", trail[last - 1]

    def _ask_gift(self) -> tuple[str, str] | None:
        if not self.gifts:
            return None
        gift = self.gifts[-1 if self.rng.random() < 0.6 else self.rng.randrange(len(self.gifts))]
        asks: list[tuple[str, Callable[[_Gift], bool], Callable[[_Gift], str]]] = [
            (f"What did {gift.giver} give to {gift.taker}?",
             lambda g: (g.giver, g.taker) == (gift.giver, gift.taker), lambda g: g.thing),
            (f"Who gave the {gift.thing} to {gift.taker}?",
             lambda g: (g.thing, g.taker) == (gift.thing, gift.taker), lambda g: g.giver),
            (f"Who did {gift.giver} give the {gift.thing} to?",
             lambda g: (g.giver, g.thing) == (gift.giver, gift.thing), lambda g: g.taker),
            (f"Who gave the {gift.thing}?", lambda g: g.thing == gift.thing, lambda g: g.giver),
            (f"Who received the {gift.thing}?", lambda g: g.thing == gift.thing,
             lambda g: g.taker),
        ]  # fmt: skip
        text, matches, answer = self.rng.choice(asks)
        return text, answer([g for g in self.gifts if matches(g)][-1])

    def _ask_is_in(self) -> tuple[str, str] | None:
        known = [p for p in self.people.values() if p.place or p.denied or p.either]
        if not known:
            return None
        person = self.rng.choice(known)
        place = self.rng.choice(self.places)
        if self.rng.random() < 0.5:
            place = person.place or person.denied or self.rng.choice(person.either or ("",))
        if person.either is not None and person.place is None:
            answer = "maybe" if place in person.either else "no"
        elif person.place is None:
            if place != person.denied:
                return None
            answer = "no"
        else:
            answer = "yes" if place == person.place else "no"
        return f"Is {person.name} in the {place}?", answer

    def _ask_count(self) -> tuple[str, str] | None:
        person = self.rng.choice(list(self.people.values()))
        return f"How many objects is {person.name} carrying?", _NUMBERS[len(person.holds)]

    def _ask_list(self) -> tuple[str, str] | None:
        person = self.rng.choice(list(self.people.values()))
        return f"What is {person.name} carrying?", ",".join(person.holds) or "nothing"
