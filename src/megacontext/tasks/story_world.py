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

from megacontext.tasks.documents import Question, Theme, WorldFact
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

# What a story of many facts is also asked about: the steps on the way to its own questions.
_SIDE_QUESTION = 0.4
# Share of places put across from a neighbour, and of questions about a place with two neighbours.
_HARD_SIDES = 0.6
# Share of questions after a thing that are about one nobody has, where there is one.
_LEFT_THING = 0.6
# Against one question in the words of a sentence, how rare one is that turns the direction round.
_TURNED = 2.5
_SIDE_KINDS = {
    "qa2": ("qa1", "qa3", "holder", "holder", "holder"),
    "qa3": ("qa1", "qa2", "holder"),
    "qa5": ("qa1", "holder", "holder"),
}

STORY_KINDS = ("qa1", "qa2", "qa3", "qa4", "qa5", "qa6", "qa7", "qa8", "qa9", "qa10")


@dataclass
class _Person:
    name: str
    place: str | None = None
    came_from: str | None = None
    denied: str | None = None
    either: tuple[str, str] | None = None
    holds: list[str] = field(default_factory=list)
    # Indices of the newest statement that says where this person is, and of the one before.
    told: int = -1
    told_before: int = -1


@dataclass
class _Asked:
    text: str
    answer: str
    notes: str = ""
    evidence: tuple[int, ...] = ()


@dataclass
class _Arrival:
    """How a thing came to a place: who brought it, and the statements that say so.

    Attributes:
        place: where it is now.
        carrier: who has it.
        taken: says that the carrier has it.
        told: says that the carrier is there.
        told_before: says where the carrier was before.
    """

    place: str
    carrier: str
    taken: int
    told: int
    told_before: int


@dataclass
class _Gift:
    giver: str
    thing: str
    taker: str
    told: int


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

    def story(self, kind: str, sentences: int, at_end: int = 0) -> Theme:
        """A story of about ``sentences`` sentences with its questions.

        Args:
            kind: one of :data:`STORY_KINDS`.
            sentences: how many sentences; of ``qa4`` at least 2 and at most 7.
            at_end: ask up to this many different questions after the last sentence; 0 asks one
                after every other sentence instead.
        """
        if kind == "qa4":
            return self._directions(max(2, min(sentences, 7)), at_end)
        story = _Story(self.rng, *self._cast(), kind)
        return story.tell_first(sentences, at_end) if at_end else story.tell(sentences)

    def _cast(self) -> tuple[list[str], list[str], list[str]]:
        count = self.rng.randint(2, 4)
        if self.rng.random() < self.babi_share:
            people = self.rng.sample(_BABI_PEOPLE, 4) if count != 3 else list(_BABI_PEOPLE[:4])
            return people, self.rng.sample(_BABI_PLACES, 6), list(_BABI_THINGS)
        return (
            self.vocabulary.people(count),
            self.vocabulary.words("place", 5),
            self.vocabulary.words("thing", 3),
        )

    def _directions(self, sentences: int, at_end: int) -> Theme:
        """Places on a grid, one a cell; each sentence relates a new place to one named before."""
        places = (
            self.rng.sample(_BABI_PLACES[:6], min(6, sentences + 1))
            if self.rng.random() < self.babi_share
            else self.vocabulary.words("place", min(sentences + 1, self.vocabulary.size("place")))
        )
        theme = Theme([])
        cells = {places[0]: (0, 0)}
        related: list[str] = []
        about: list[str] = []
        plain: list[bool] = []
        for place in places[1:]:
            known, direction = self._free_side(cells)
            (x, y), (dx, dy) = cells[known], _OFFSETS[direction]
            cells[place] = (x + dx, y + dy)
            new = place
            related += [known, new]
            if self.rng.random() < 0.5:
                known, new, direction = new, known, _OPPOSITES[direction]
            back = _OPPOSITES[direction]
            theme.statements.append(f"The {new} is {direction} of the {known}.")
            after = len(places) - 1 if at_end else len(theme.statements)
            asked = [
                Question(f"What is {direction} of the {known}?", new, after, "qa4"),
                Question(f"What is the {new} {direction} of?", known, after, "qa4"),
                Question(f"What is {back} of the {new}?", known, after, "qa4"),
                Question(f"What is the {known} {back} of?", new, after, "qa4"),
            ]
            about += [known, new, new, known]
            plain += [True, True, False, False]
            theme.questions.extend(asked if at_end else self.rng.sample(asked, 2))
        if at_end:
            # Of a place with two neighbours the direction has to be understood.
            chosen = list(range(len(plain)))
            hard = [i for i in chosen if related.count(about[i]) > 1]
            if hard and self.rng.random() < _HARD_SIDES:
                chosen = hard
            # Drawn by weight without replacement. Whether a sentence answers is the parity of three
            # things (which place it names first, its direction, the form of the question); without
            # a bias no single one of them would tell anything, and learning would not begin.
            keys = {i: self.rng.random() ** (1.0 if plain[i] else _TURNED) for i in chosen}
            chosen.sort(key=keys.__getitem__, reverse=True)
            theme.questions[:] = [theme.questions[i] for i in chosen[: min(at_end, 3)]]
        return theme

    def _free_side(self, cells: dict[str, tuple[int, int]]) -> tuple[str, str]:
        """A place and a free side of it, often the one across from a neighbour."""
        free = [
            (known, direction)
            for known, (x, y) in cells.items()
            for direction, (dx, dy) in _OFFSETS.items()
            if (x + dx, y + dy) not in cells.values()
        ]
        across: list[tuple[str, str]] = []
        for known, direction in free:
            (x, y), (dx, dy) = cells[known], _OFFSETS[direction]
            if (x - dx, y - dy) in cells.values():
                across.append((known, direction))
        return self.rng.choice(across if across and self.rng.random() < _HARD_SIDES else free)


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
        self.trails: dict[str, list[_Arrival]] = {thing: [] for thing in things}
        self.owner: dict[str, str] = {}
        # Who touched a thing last, the statement that says so, and of a thing that was left the one
        # that says where that person was.
        self.handler: dict[str, str] = {}
        self.touched: dict[str, int] = {}
        self.left_at: dict[str, int] = {}
        self.gifts: list[_Gift] = []
        self.theme = Theme([])

    def tell(self, sentences: int) -> Theme:
        """The story with questions on the way."""
        while len(self.theme.statements) < sentences:
            self._event()
            self.theme.facts.append(self._facts())
            if self.rng.random() < 0.5:
                self._ask()
        return self.theme

    def tell_first(self, sentences: int, questions: int) -> Theme:
        """The whole story, then up to ``questions`` different questions.

        An answer given on the way can be copied later; these have to be worked out.
        """
        while len(self.theme.statements) < sentences:
            self._event()
            self.theme.facts.append(self._facts())
        for _ in range(3 * questions):
            if len(self.theme.questions) == questions:
                break
            self._ask()
        return self.theme

    def _facts(self) -> tuple[WorldFact, ...]:
        """What holds now of those in the newest sentence, but is not said in it."""
        facts = [("where", p.name, p.place) for p in self.people.values() if p.place is not None]
        facts += [("from", p.name, p.came_from) for p in self.people.values() if p.came_from]
        facts += [("holder", thing, owner) for thing, owner in self.owner.items()]
        facts += [("carries", owner, thing) for thing, owner in self.owner.items()]
        newest: dict[tuple[str, str], str] = {}
        for gift in self.gifts:
            for relation, entity, value in (
                ("giver", gift.thing, gift.giver), ("taker", gift.thing, gift.taker),
                ("gave", gift.giver, gift.thing), ("received", gift.taker, gift.thing),
            ):  # fmt: skip
                # Taken out first, so that the newest come last.
                newest.pop((relation, entity), None)
                newest[relation, entity] = value
        facts += [(relation, entity, value) for (relation, entity), value in newest.items()]
        if self.kind in ("qa2", "qa3"):
            for thing, trail in self.trails.items():
                facts += [("where", thing, trail[-1].place)] if trail else []
                facts += [("before", thing, trail[-2].place)] if len(trail) > 1 else []
        said = self.theme.statements[-1]
        return tuple(fact for fact in facts if fact[1] in said and fact[2] not in said)

    def _ask(self) -> None:
        """Asks once, unless there is nothing to ask or this was asked here before."""
        asks: dict[str, Callable[[], _Asked | None]] = {
            "qa1": self._ask_place, "qa2": self._ask_thing, "qa3": self._ask_before,
            "qa5": self._ask_gift, "qa6": self._ask_is_in, "qa7": self._ask_count,
            "qa8": self._ask_list, "qa9": self._ask_is_in, "qa10": self._ask_is_in,
            "holder": self._ask_holder,
        }  # fmt: skip
        kind = self.kind
        if self.rng.random() < _SIDE_QUESTION:
            kind = self.rng.choice(_SIDE_KINDS.get(kind, (kind,)))
        asked = asks[kind]()
        after = len(self.theme.statements)
        known = {question.text for question in self.theme.questions if question.after == after}
        if asked is None or asked.text in known:
            return
        facts = tuple(
            ("holder", thing, name)
            for thing, name in self.handler.items()
            if kind in ("qa2", "qa3") and f" {thing}" in asked.text
        )
        question = Question(
            asked.text, asked.answer, after, kind, lasting=False, facts=facts, notes=asked.notes,
            evidence=asked.evidence,
        )  # fmt: skip
        self.theme.questions.append(question)

    @property
    def _newest(self) -> int:
        """Index of the newest statement."""
        return len(self.theme.statements) - 1

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
        person.came_from, person.place = person.place, place
        person.told_before, person.told = person.told, self._newest
        person.denied = person.either = None
        for thing in person.holds:
            self._thing_at(thing, person)

    def _deny(self, person: _Person) -> None:
        place = person.place or self.rng.choice(self.places)
        verb = "is no longer" if self.rng.random() < 0.5 else "is not"
        self._say(f"{person.name} {verb} in the {place}.")
        person.place, person.denied, person.told = None, place, self._newest

    def _either(self, person: _Person) -> None:
        first, second = self.rng.sample(self.places, 2)
        self._say(f"{person.name} is either in the {first} or the {second}.")
        person.place, person.either, person.told = None, (first, second), self._newest

    def _thing_at(self, thing: str, person: _Person) -> None:
        trail = self.trails[thing]
        if person.place is not None and (not trail or trail[-1].place != person.place):
            trail.append(
                _Arrival(
                    person.place, person.name, self.touched[thing], person.told, person.told_before
                )
            )

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
            self.touched[thing], self.left_at[thing] = self._newest, person.told
        else:
            self._get(person)

    def _get(self, person: _Person) -> None:
        free = [
            thing
            for thing in self.things
            if thing not in self.owner
            and (
                not self.trails[thing]
                or person.place is None
                or self.trails[thing][-1].place == person.place
            )
        ]
        if not free or (person.place is None and self.kind in ("qa2", "qa3")):
            self._move(person)
            return
        thing = self.rng.choice(free)
        person.holds.append(thing)
        self.owner[thing] = self.handler[thing] = person.name
        tail = self.rng.choice((" there", ""))
        self._say(f"{person.name} {self.rng.choice(_GETS)} the {thing}{tail}.")
        self.touched[thing] = self._newest
        self._thing_at(thing, person)

    def _give(self, giver: _Person, taker: _Person) -> None:
        thing = self.rng.choice(giver.holds)
        giver.holds.remove(thing)
        taker.holds.append(thing)
        self.owner[thing] = taker.name
        verb = self.rng.choice(_GIVES)
        if self.rng.random() < 0.2:
            self._say(f"{giver.name} {verb} {taker.name} the {thing}.")
        else:
            self._say(f"{giver.name} {verb} the {thing} to {taker.name}.")
        self.handler[thing], self.touched[thing] = taker.name, self._newest
        self.gifts.append(_Gift(giver.name, thing, taker.name, self._newest))

    def _ask_place(self) -> _Asked | None:
        known = [p for p in self.people.values() if p.place is not None]
        if not known:
            return None
        person = self.rng.choice(known)
        return _Asked(f"Where is {person.name}?", str(person.place), evidence=(person.told,))

    def _ask_thing(self) -> _Asked | None:
        known = [thing for thing in self.things if self.trails[thing]]
        if not known:
            return None
        left = [thing for thing in known if thing not in self.owner]
        # The harder half: where somebody was who has moved on since.
        thing = self.rng.choice(left if left and self.rng.random() < _LEFT_THING else known)
        place, name = self.trails[thing][-1].place, self.handler[thing]
        if thing in self.owner:
            told = self.people[name].told
            notes = f"{name} has the {thing}. {name} is in the {place}."
        else:
            told = self.left_at[thing]
            notes = f"{name} left the {thing}. The {thing} is in the {place}."
        return _Asked(f"Where is the {thing}?", place, notes, (self.touched[thing], told))

    def _ask_holder(self) -> _Asked | None:
        """Who has a thing, or had it last: the reverse of looking up what somebody did."""
        known = [thing for thing in self.things if thing in self.touched]
        if not known:
            return None
        thing = self.rng.choice(known)
        needed = (self.touched[thing],)
        if thing in self.owner:
            return _Asked(f"Who has the {thing}?", self.owner[thing], evidence=needed)
        return _Asked(f"Who left the {thing}?", self.handler[thing], evidence=needed)

    def _ask_before(self) -> _Asked | None:
        known = [thing for thing in self.things if len(self.trails[thing]) > 1]
        if not known:
            return self._ask_thing()
        thing = self.rng.choice(known)
        trail = self.trails[thing]
        index = len(trail) - self.rng.randint(1, min(3, len(trail) - 1))
        place = trail[index].place
        last = max(i for i, arrival in enumerate(trail) if arrival.place == place)
        arrival, before = trail[last], trail[last - 1]
        carrier = arrival.carrier
        notes = f"{carrier} took it to the {place}. {carrier} came from the {before.place}."
        needed = (arrival.told, arrival.told_before, arrival.taken)
        return _Asked(f"Where was the {thing} before the {place}?", before.place, notes, needed)

    def _ask_gift(self) -> _Asked | None:
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
        # Questions that name the thing alone are the hard ones: its sentences are many.
        text, matches, answer = self.rng.choices(asks, (1, 3, 1, 3, 2))[0]
        newest = [g for g in self.gifts if matches(g)][-1]
        return _Asked(text, answer(newest), evidence=(newest.told,))

    def _ask_is_in(self) -> _Asked | None:
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
        return _Asked(f"Is {person.name} in the {place}?", answer)

    def _ask_count(self) -> _Asked | None:
        person = self.rng.choice(list(self.people.values()))
        count = _NUMBERS[len(person.holds)]
        return _Asked(f"How many objects is {person.name} carrying?", count)

    def _ask_list(self) -> _Asked | None:
        person = self.rng.choice(list(self.people.values()))
        held = ",".join(person.holds) or "nothing"
        return _Asked(f"What is {person.name} carrying?", held)
