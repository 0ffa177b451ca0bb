from __future__ import annotations

import itertools
import random

import pytest

from megacontext.errors import InputError
from megacontext.tasks.documents import Question, Theme
from megacontext.tasks.fact_themes import FactThemes
from megacontext.tasks.planting import plant

TEXT = " ".join(f"The day number {i} went by slowly. It was dull." for i in range(60))


@pytest.mark.parametrize("seed", range(8))
def test_facts_stand_at_the_reported_characters_in_order(seed):
    theme = FactThemes(random.Random(seed), "held_out").plain(9)
    planted, facts = plant(TEXT, theme, random.Random(seed))
    assert [fact.statement for fact in facts] == theme.statements
    assert [(f.question, f.answer, f.family) for f in facts] == [
        (q.text, q.answer, q.family) for q in theme.questions
    ]
    for fact in facts:
        assert planted[fact.character :].startswith(f"{fact.statement} ")
        assert planted[fact.character - 2 : fact.character] == ". "
    places = [fact.character for fact in facts]
    assert places == sorted(places)


def test_the_text_around_the_facts_is_the_old_one():
    theme = FactThemes(random.Random(0)).plain(12)
    planted, facts = plant(TEXT, theme, random.Random(0))
    for fact in reversed(facts):
        end = fact.character + len(fact.statement)
        planted = planted[: fact.character - 1] + planted[end:]
    assert planted == TEXT


def test_facts_are_spread_evenly_and_keep_off_the_end():
    theme = FactThemes(random.Random(0)).plain(10)
    for seed in range(20):
        planted, facts = plant(TEXT, theme, random.Random(seed), last_share=0.5)
        shares = [fact.character / len(planted) for fact in facts]
        assert shares[-1] < 0.65
        assert max(b - a for a, b in itertools.pairwise(shares)) < 0.2


def test_the_place_depends_on_the_seed_alone():
    theme = FactThemes(random.Random(0)).plain(5)
    assert plant(TEXT, theme, random.Random(3)) == plant(TEXT, theme, random.Random(3))
    assert plant(TEXT, theme, random.Random(3)) != plant(TEXT, theme, random.Random(4))


@pytest.mark.parametrize("count", [1, 3])
def test_exactly_as_many_gaps_as_facts_are_enough(count):
    text = "One went. " * (count + 1) + "x" * 200
    theme = FactThemes(random.Random(0)).plain(count)
    assert len(plant(text, theme, random.Random(0))[1]) == count
    with pytest.raises(InputError, match=f"room for {count} facts, not for {count + 1}; use a lon"):
        plant(text, FactThemes(random.Random(0)).plain(count + 1), random.Random(0))


def test_a_text_without_sentences_is_refused():
    theme = Theme(["A fact."], [Question("What?", "A", 1, "code")])
    with pytest.raises(InputError, match="room for 0 facts"):
        plant("no sentence ends here", theme, random.Random(0))
