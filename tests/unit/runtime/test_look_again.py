"""Looking again while an answer is written: when it happens, and what is then looked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from engine_cases import K, config, new_engine, words

from megacontext.runtime.answer import Looks
from megacontext.runtime.focus_scores import FocusScores

N_TOKENS = 40
ASKED = "who is it?"
SECRET = "the zebra sleeps in the blue barn. "


class Logging:
    """Asks for nothing, so that every look reads the same context, and keeps what was asked."""

    name = "logging"

    def __init__(self):
        self.queries = []

    def score(self, view):
        self.queries.append(view.query.tolist())
        return FocusScores.unknown(len(view.context))


def engine_of(base, folder, policy, name="a", **changes):
    engine = new_engine(folder, base, name=name, policy=policy, config=config(**changes))
    engine.ingest(words(400) + SECRET + words(600, seed=1))
    return engine


def written(engine, prompt="\nwho? ", **options):
    options = {"max_new_tokens": N_TOKENS, "eos_token_id": (), "remember": False, **options}
    return [token.id for token in engine.generate(prompt, **options)]


def letters(base, ids):
    """Places of a printable character that the model writes more than once, and a pair of them."""
    texts = base.token_texts(ids)
    plain = [i for i, text in enumerate(texts) if text.isascii() and text.isprintable()]
    pairs = [i for i in plain if i + 1 in plain]
    return texts[plain[2]], texts[pairs[0]] + texts[pairs[0] + 1]


def notes(base, ids, mark):
    """How many tokens were written where something new is looked for: none, or up to the mark."""
    return [
        count
        for count in range(len(ids))
        if not count or (mark and base.decode(ids[:count]).endswith(mark))
    ]


def looks(base, ids, mark):
    """How many tokens were written at each look: those, and every block."""
    return sorted({*notes(base, ids, mark), *range(0, len(ids), K)})


@pytest.mark.parametrize("remember", [False, True])
@pytest.mark.parametrize("which", ["none", "letter", "pair"])
def test_the_query_holds_what_was_written(base, remember, which, tmp_path):
    plain = written(engine_of(base, tmp_path, Logging()), query=ASKED)
    letter, pair = letters(base, plain)
    mark = {"none": "", "letter": letter, "pair": pair}[which]
    engine = engine_of(base, tmp_path, Logging(), name="b")
    ids = written(engine, query=ASKED, look_again=mark, remember=remember)
    if not remember:
        assert ids == plain, "looking changes nothing where nothing is edited"
    places = notes(base, ids, mark)
    assert len(places) > 2 or which == "none"
    asked = base.encode(ASKED).tolist()
    assert engine.focus.policy.queries == [asked + ids[:count] for count in places]
    rounds = [record.round for record in engine.focus.records]
    assert rounds == list(range(1, len(looks(base, ids, mark)) + 1))


def test_without_a_query_the_newest_tokens_ask(base, tmp_path):
    """Of prompt and answer, as many as ask at all."""
    engine = engine_of(base, tmp_path, Logging(), query_tokens=12)
    prompt = base.encode("\nwho? ").tolist()
    mark, _ = letters(base, written(engine))
    engine.focus.policy.queries.clear()
    ids = written(engine, look_again=mark)
    expected = [(prompt + ids[:count])[-12:] for count in looks(base, ids, mark)]
    assert engine.focus.policy.queries == expected


class Finding(Logging):
    """Finds one old block for whatever is asked first, and another one ever after."""

    first, later = 3, 9

    def score(self, view):
        unknown = super().score(view)
        block = self.first if len(self.queries) == 1 else self.later
        if int(view.context.levels[view.context.index_of(block * K)]) == 0:
            return unknown
        return replace(
            unknown, proposal_blocks=torch.tensor([block]), proposal_utility=torch.tensor([5.0])
        )


def raw_blocks(record):
    return {start // K for level, start, _ in record.spans.tolist() if level == 0}


@pytest.mark.parametrize("query", [ASKED, ""])
def test_what_was_found_for_a_question_holds_until_something_is_noted(base, query, tmp_path):
    """Also where room must be made, for which the oldest detail would go first."""
    engine = engine_of(
        base,
        tmp_path,
        Finding(),
        refocus_rounds=1,
        query_tokens=N_TOKENS + K,
        tail_tokens=0,
        allocator={"cooldown": 0},
    )
    prompt = "\n" + "who? " * 12
    tokens = list(
        engine.generate(
            prompt, query=query, remember=True, max_new_tokens=N_TOKENS + K, eos_token_id=()
        )
    )
    policy, records = engine.focus.policy, list(engine.focus.records)
    assert len(policy.queries) == 1, "nothing new is asked"
    assert len({token.round for token in tokens}) == len(records) == 3
    assert all(policy.first in raw_blocks(record) for record in records)
    assert all(record.proposals == () for record in records[1:])
    assert any(edit.reason == "room" for record in records[1:] for edit in record.edits)


def test_a_text_that_goes_on_asks_again_at_every_block(base, tmp_path):
    """Once the prompt lies further back than what asks."""
    engine = engine_of(base, tmp_path, Finding(), refocus_rounds=1, query_tokens=K)
    written(engine, "\n" + "who? " * 12, remember=True)
    assert len(engine.focus.policy.queries) == len(engine.focus.records) == 2


def test_what_was_written_leads_to_the_next_place(base, tmp_path):
    """The words behind a look are read with what that look has opened."""
    secret = 400 // K

    class Led(Logging):
        """Knows where to look once there is a note."""

        def score(self, view):
            unknown = super().score(view)
            if len(view.query) == len(base.encode(ASKED)):
                return unknown
            return replace(
                unknown,
                proposal_blocks=torch.tensor([secret]),
                proposal_utility=torch.tensor([5.0]),
            )

    plain = written(engine_of(base, tmp_path, Logging()), query=ASKED)
    mark, _ = letters(base, plain)
    engine = engine_of(base, tmp_path, Led(), name="b")
    tokens = list(
        engine.generate(
            "\nwho? ", query=ASKED, look_again=mark, remember=False, max_new_tokens=K - 1,
            eos_token_id=(),
        )
    )  # fmt: skip
    spans = {record.round: record.spans.tolist() for record in engine.focus.records}
    first = next(i for i, token in enumerate(plain) if base.token_texts([token]) == [mark])
    for index, token in enumerate(tokens):
        raw = {start // K for level, start, _ in spans[token.round] if level == 0}
        assert (secret in raw) == (index > first)


def test_each_look_has_as_many_rounds_as_the_first(base, tmp_path):
    """As long as a round opens something the next one may follow it."""

    class Restless(Logging):
        """Opens another block at every round."""

        def score(self, view):
            super().score(view)
            gists = (view.context.levels == 1).nonzero().flatten()
            utility = torch.zeros(len(view.context))
            utility[gists[len(self.queries) % len(gists)]] = 5.0
            nothing = torch.empty(0)
            return FocusScores(nothing.long(), nothing, torch.zeros_like(utility), utility)

    engine = engine_of(base, tmp_path, Restless(), refocus_rounds=3, budget=220)
    ids = written(engine, query=ASKED, max_new_tokens=3, look_again="")
    assert len(engine.focus.policy.queries) == 3
    engine.focus.policy.queries.clear()
    (mark,) = base.token_texts(ids[:1])
    again = written(engine, query=ASKED, max_new_tokens=2, look_again=mark)
    assert again[0] == ids[0]
    assert len(engine.focus.policy.queries) == 6


@pytest.mark.parametrize(
    ("mark", "said", "again"),
    [
        (".", "He left.", True),
        (".", "He left. ", False),
        (".", "", False),
        (".\n", "He left.\n", True),
        ("\n", "He left.\n", True),
        ("é", "un café", True),
        ("。", "彼は去った。", True),
        ("ft.", "He left.", True),
        ("ft.", "t.", False),
        ("", "He left.", False),
    ],
)
def test_the_mark_may_be_of_several_tokens(base, mark, said, again):
    """A token is a byte here: some characters are three of them."""
    assert Looks(None, mark).after(base, base.encode(said)) is again


def test_half_a_character_is_no_mark(base):
    assert not Looks(None, "é").after(base, base.encode("é")[:1])
