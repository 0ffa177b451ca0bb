"""Answers the questions of stories by reading their sentences anew: slow, and shares no code.

``allowed_answers`` gives every answer that the sentences support. A question is a good one if that
is exactly one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MOVE = re.compile(
    r"(?P<who>.+?) (?:moved to|went to|journeyed to|travelled to|went back to|is in)"
    r" the (?P<place>\w+)\."
)
DENIAL = re.compile(r"(?P<who>.+?) is (?:no longer|not) in the (?P<place>\w+)\.")
EITHER = re.compile(r"(?P<who>.+?) is either in the (?P<place>\w+) or the (?P<other>\w+)\.")
GET = re.compile(r"(?P<who>.+?) (?:got|picked up|grabbed|took) the (?P<thing>\w+)(?: there)?\.")
DROP = re.compile(
    r"(?P<who>.+?) (?:dropped|discarded|put down|left) the (?P<thing>\w+)(?: there)?\."
)
GIVE = re.compile(r"(?P<who>.+?) (?:gave|handed|passed) the (?P<thing>\w+) to (?P<to>[\w ]+)\.")
GIVE_SHORT = re.compile(
    r"(?P<who>[A-Z]\w*(?: [A-Z]\w*)?) (?:gave|handed|passed) (?P<to>[A-Z]\w*(?: [A-Z]\w*)?)"
    r" the (?P<thing>\w+)\."
)
RELATION = re.compile(r"The (?P<a>\w+) is (?P<way>north|south|east|west) of the (?P<b>\w+)\.")
STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
COUNTS = ("none", "one", "two", "three", "four", "five", "six")

Event = tuple[str, dict[str, str]]
_KINDS = (
    ("denial", DENIAL), ("either", EITHER), ("give", GIVE), ("give", GIVE_SHORT), ("get", GET),
    ("drop", DROP), ("relation", RELATION), ("move", MOVE),
)  # fmt: skip


def read(sentence: str) -> Event:
    for kind, pattern in _KINDS:
        if match := pattern.fullmatch(sentence):
            return kind, match.groupdict()
    raise AssertionError(f"no sentence of a story: {sentence!r}")


def place_of(events: Sequence[Event], who: str) -> str | None:
    """Where somebody is, by the last sentence that says so; denials make it unknown."""
    for kind, parts in reversed(events):
        if kind in ("move", "denial", "either") and parts["who"] == who:
            return parts["place"] if kind == "move" else None
    return None


def holder_of(events: Sequence[Event], thing: str) -> str | None:
    for kind, parts in reversed(events):
        if kind in ("get", "drop", "give") and parts["thing"] == thing:
            return {"get": parts["who"], "drop": None, "give": parts.get("to")}[kind]
    return None


def held_by(events: Sequence[Event], who: str) -> list[str]:
    """What somebody carries, in the order in which it came."""
    taken: dict[str, int] = {}
    for time, (kind, parts) in enumerate(events):
        taker = parts.get("to") if kind == "give" else parts.get("who")
        if kind in ("get", "give") and taker == who:
            taken[parts["thing"]] = time
    mine = [thing for thing in taken if holder_of(events, thing) == who]
    return sorted(mine, key=lambda thing: taken[thing])


def trail_of(events: Sequence[Event], thing: str) -> list[str]:
    """The places a thing has been in since it was first picked up, without repetitions in a row."""
    trail: list[str] = []
    for time in range(1, len(events) + 1):
        past = events[:time]
        holder = holder_of(past, thing)
        place = place_of(past, holder) if holder else None
        if place and (not trail or trail[-1] != place):
            trail.append(place)
    return trail


def check_plausible(events: Sequence[Event], whereabouts: bool) -> None:
    """Nobody takes what another one holds, gives what he lacks, or takes what lies elsewhere."""
    for time, (kind, parts) in enumerate(events):
        past = events[:time]
        if kind == "get":
            assert holder_of(past, parts["thing"]) is None
            if whereabouts and (trail := trail_of(past, parts["thing"])):
                assert place_of(past, parts["who"]) == trail[-1]
        elif kind in ("drop", "give"):
            assert holder_of(past, parts["thing"]) == parts["who"]
            assert parts["who"] != parts.get("to")


def grid_of(events: Sequence[Event]) -> dict[str, tuple[int, int]]:
    """Cells of all places that hang together with the first; refuses contradictions."""
    cells = {events[0][1]["b"]: (0, 0)}
    for _ in events:
        for _, parts in events:
            dx, dy = STEPS[parts["way"]]
            if parts["b"] in cells:
                x, y = cells[parts["b"]]
                assert cells.setdefault(parts["a"], (x + dx, y + dy)) == (x + dx, y + dy)
            elif parts["a"] in cells:
                x, y = cells[parts["a"]]
                cells[parts["b"]] = (x - dx, y - dy)
    return cells


def allowed_answers(statements: Sequence[str], question: str) -> set[str]:
    events = [read(sentence) for sentence in statements]
    for pattern, answer in _QUESTIONS:
        if match := re.fullmatch(pattern, question):
            return {found for found in answer(events, *match.groups()) if found}
    raise AssertionError(f"no question of a story: {question!r}")


def _thing(events: Sequence[Event], thing: str) -> set[str | None]:
    return set(trail_of(events, thing)[-1:])


def _person(events: Sequence[Event], who: str) -> set[str | None]:
    return {place_of(events, who)}


def _holder(events: Sequence[Event], thing: str) -> set[str | None]:
    return {holder_of(events, thing)}


def _left(events: Sequence[Event], thing: str) -> set[str | None]:
    """Who dropped a thing that nobody has."""
    for kind, parts in reversed(events):
        if kind in ("get", "drop", "give") and parts["thing"] == thing:
            return {parts["who"]} if kind == "drop" else set()
    return set()


def _before(events: Sequence[Event], thing: str, place: str) -> set[str | None]:
    trail = trail_of(events, thing)
    latest = len(trail) - 1 - trail[::-1].index(place)
    return {trail[latest - 1]} if latest else set()


def _gift(events: Sequence[Event], asked: str, **known: str) -> set[str | None]:
    """The newest gift that fits what is known of it."""
    for kind, parts in reversed(events):
        if kind == "give" and all(parts[name] == value for name, value in known.items()):
            return {parts[asked]}
    return set()


def _is_in(events: Sequence[Event], who: str, place: str) -> set[str | None]:
    for kind, parts in reversed(events):
        if parts.get("who") != who or kind not in ("move", "denial", "either"):
            continue
        if kind == "move":
            return {"yes" if parts["place"] == place else "no"}
        if kind == "denial":
            # Not being in one place says nothing of the others.
            return {"no"} if parts["place"] == place else {"yes", "no", "maybe"}
        return {"maybe" if place in (parts["place"], parts["other"]) else "no"}
    return {"yes", "no", "maybe"}


def _neighbours(events: Sequence[Event], place: str, way: str, sign: int) -> set[str | None]:
    cells = grid_of(events)
    x, y = cells[place]
    dx, dy = STEPS[way]
    wanted = (x + sign * dx, y + sign * dy)
    return {other for other, cell in cells.items() if cell == wanted}


_QUESTIONS = (
    (r"Where is the (\w+)\?", _thing),
    (r"Where is ([\w ]+)\?", _person),
    (r"Who has the (\w+)\?", _holder),
    (r"Who left the (\w+)\?", _left),
    (r"Where was the (\w+) before the (\w+)\?", _before),
    (r"What did ([\w ]+) give to ([\w ]+)\?", lambda e, a, b: _gift(e, "thing", who=a, to=b)),
    (r"Who gave the (\w+) to ([\w ]+)\?", lambda e, t, b: _gift(e, "who", thing=t, to=b)),
    (r"Who did ([\w ]+) give the (\w+) to\?", lambda e, a, t: _gift(e, "to", who=a, thing=t)),
    (r"Who gave the (\w+)\?", lambda e, t: _gift(e, "who", thing=t)),
    (r"Who received the (\w+)\?", lambda e, t: _gift(e, "to", thing=t)),
    (r"Is ([\w ]+) in the (\w+)\?", _is_in),
    (r"How many objects is ([\w ]+) carrying\?", lambda e, a: {COUNTS[len(held_by(e, a))]}),
    (r"What is ([\w ]+) carrying\?", lambda e, a: {",".join(held_by(e, a)) or "nothing"}),
    (r"What is (\w+) of the (\w+)\?", lambda e, way, p: _neighbours(e, p, way, 1)),
    (r"What is the (\w+) (\w+) of\?", lambda e, p, way: _neighbours(e, p, way, -1)),
)
