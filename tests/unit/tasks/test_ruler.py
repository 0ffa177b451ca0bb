"""RULER's tasks have the structure and the numbers that the paper gives them."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from megacontext.errors import InputError
from megacontext.tasks import fact_themes
from megacontext.tasks.ruler import RulerTasks

WORDINGS = ("ruler", "plain")
SEEDS = range(8)


def tasks(seed=0, wording="ruler"):
    return RulerTasks(random.Random(seed), wording)


def pattern(template: str) -> re.Pattern[str]:
    """A needle with its key and value as groups."""
    return re.compile(re.escape(template).replace("KEY", "(.+)").replace("VALUE", r"(\d+)"))


NEEDLES = {
    "ruler": pattern("One of the special magic numbers for KEY is: VALUE."),
    "plain": pattern("The secret code of the KEY is VALUE."),
}


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize(
    ("keys", "values", "queries"), [(1, 1, 1), (4, 1, 1), (1, 4, 1), (4, 1, 4), (5, 2, 3)]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_needles(wording, keys, values, queries, seed):
    text = tasks(seed, wording).needles(keys=keys, values=values, queries=queries)
    told = [NEEDLES[wording].fullmatch(statement).groups() for statement in text.statements]
    per_key = Counter(key for key, _ in told)
    assert list(per_key.values()) == [values] * keys
    assert len({value for _, value in told}) == keys * values
    assert all(len(value) == 7 for _, value in told)
    asked = [key for key in per_key if re.search(rf"\b{key}\b", text.question)]
    assert len(asked) == queries
    expected = [value for key, value in told if key in asked]
    assert list(text.answers) == expected
    assert [told[index][1] for index in text.evidence] == expected
    assert text.context == ""


def test_the_published_questions():
    single = tasks().needles()
    key = NEEDLES["ruler"].fullmatch(single.statements[0]).group(1)
    assert re.fullmatch(r"[a-z]+-[a-z]+", key)
    assert single.question == (
        f"What is the special magic number for {key} mentioned in the provided text?"
    )
    several = tasks().needles(keys=3, queries=3)
    assert re.fullmatch(
        r"What are all the special magic numbers for [\w-]+, [\w-]+, and [\w-]+ mentioned in the "
        r"provided text\?",
        several.question,
    )
    values = tasks().needles(values=4)
    assert values.question.startswith("What are all the special magic numbers for ")


def test_plain_wording_is_what_the_bundled_model_was_trained_on():
    def trained(templates: tuple[str, ...], key: str, value: str = "") -> list[str]:
        return [template.format(k=key, v=value) for template in templates]

    single = tasks(1, "plain").needles()
    key, value = NEEDLES["plain"].fullmatch(single.statements[0]).groups()
    assert single.statements[0] in trained(fact_themes._CODE_STATEMENTS, key, value)
    assert single.question in trained(fact_themes._CODE_QUESTIONS, key)
    several = tasks(1, "plain").needles(values=4)
    key, _ = NEEDLES["plain"].fullmatch(several.statements[0]).groups()
    assert several.question in trained(fact_themes._SEVERAL_QUESTIONS, key)
    known = fact_themes.FactThemes(random.Random(1)).variables(2, 4)
    traced = tasks(1, "plain").variable_tracking(chains=2, hops=3)
    assert set(map(shape, traced.statements)) == set(map(shape, known.statements))
    assert {shape(traced.question)} == {shape(question.text) for question in known.questions}


def shape(sentence: str) -> str:
    """A sentence without the names and numbers that are drawn anew."""
    return re.sub(r"(?<=VAR )[A-Z]{3}\b", "NAME", re.sub(r"\b\d{5}\b", "NUMBER", sentence))


def test_many_keys_differ():
    for wording in WORDINGS:
        text = tasks(0, wording).needles(keys=1000)
        keys = {NEEDLES[wording].fullmatch(s).group(1) for s in text.statements}
        assert len(keys) == 1000


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize(("chains", "hops"), [(1, 4), (3, 2), (2, 1)])
@pytest.mark.parametrize("seed", SEEDS)
def test_variable_tracking(wording, chains, hops, seed):
    text = tasks(seed, wording).variable_tracking(chains=chains, hops=hops)
    assert len(text.statements) == chains * (hops + 1)
    values: dict[str, str] = {}
    for statement in text.statements:
        assert statement.endswith(".") == (wording == "plain")
        name, source = re.fullmatch(r"VAR (\w+) = (?:VAR )?(\w+)\.?", statement).groups()
        assert name not in values
        # A variable is assigned only once its source has a value.
        values[name] = source if source.isdigit() else values[source]
    per_value = Counter(values.values())
    assert list(per_value.values()) == [hops + 1] * chains
    assert all(len(value) == 5 for value in per_value)
    if wording == "ruler":
        value = re.search(r"assigned the value (\d{5}) in the text above", text.question).group(1)
        assert set(text.answers) == {name for name, known in values.items() if known == value}
    else:
        name = re.fullmatch(r"What is the value of VAR ([A-Z]{3})\?", text.question).group(1)
        value = values[name]
        assert text.answers == (value,)
        assert text.statements[text.evidence[-1]].startswith(f"VAR {name} =")
    said = [re.match(r"VAR (\w+)", text.statements[index]).group(1) for index in text.evidence]
    assert [values[name] for name in said] == [value] * (hops + 1)


@pytest.mark.parametrize(
    "numbers", [{}, {"repeats": 6, "other_repeats": 1}, {"common": 2, "repeats": 4}]
)
def test_common_words(numbers):
    text = tasks(3).common_words(50, **numbers)
    entries = re.findall(r"(\d+)\. (\w+)", text.context)
    assert " ".join(f"{number}. {word}" for number, word in entries) == text.context
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    common, repeats = numbers.get("common", 10), numbers.get("repeats", 30)
    top = counts.most_common(common)
    assert {word for word, _ in top} == set(text.answers)
    assert [count for _, count in top] == [repeats] * common
    others = set(counts.values()) - {repeats}
    assert others == {numbers.get("other_repeats", 3)}
    assert len(counts) == 50
    assert f" {common} " in text.question


def test_frequent_words_follow_the_zeta_distribution():
    text = tasks(4).frequent_words(10_000)
    counts = Counter(text.context.split(" "))
    ranked = counts.most_common(4)
    assert ranked[0][0] == "..."
    assert tuple(word for word, _ in ranked[1:]) == text.answers
    # With alpha = 2, zeta is pi squared over six.
    expected = [int(10_000 / rank**2 / 1.6449340668482264) for rank in range(1, 5)]
    assert [count for _, count in ranked] == expected
    assert all(re.fullmatch("[a-z]{6}", word) for word in counts if word != "...")


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(InputError, match="2 of 1 keys are asked for"):
        tasks().needles(queries=2)
    with pytest.raises(InputError, match="there are not 91 numbers of 2 digits"):
        tasks().needles(keys=91, digits=2)
    with pytest.raises(InputError, match="leave nothing to ask"):
        tasks().common_words(10)
    with pytest.raises(InputError, match="leave nothing to ask"):
        tasks().common_words(20, repeats=3)
    with pytest.raises(InputError, match="too few to tell their frequencies"):
        tasks().frequent_words(20)


@pytest.mark.parametrize("wording", WORDINGS)
def test_a_seed_gives_one_text(wording):
    def drawn(seed):
        made = tasks(seed, wording)
        return (
            made.needles(keys=4), made.variable_tracking(), made.common_words(20),
            made.frequent_words(200),
        )  # fmt: skip

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
