from __future__ import annotations

import re

import pytest
from tiny_models import tiny_base_model

from megacontext.errors import ConfigError, InputError
from megacontext.evaluation.noise import NoiseTokens
from megacontext.evaluation.recall_questions import RecallConfig, recall_questions

BASE = tiny_base_model()
NOISE = NoiseTokens(BASE, [" ".join(f"Noise number {i}." for i in range(300))])
TASKS = ("planted", "synonyms", "corrections", "key_value")


def ask(task, count=12, length=4000, seed=0, **own):
    config = RecallConfig.parse({"task": task} | own)
    return recall_questions(NOISE, config, count=count, length=length, seed=seed)


@pytest.mark.parametrize("task", TASKS)
def test_the_evidence_holds_the_answer(task):
    for question in ask(task):
        assert len(question.history) == 4000
        [(start, end)] = question.evidence
        assert question.answers[0] in BASE.decode(question.history[start:end])
        assert question.is_right(f" {question.answers[0]}\n")
        assert not question.is_right(" nothing\n")


def subject(question: str) -> str:
    names = re.findall(r" ([A-Z][a-z]+(?: [A-Z][a-z]+)?)", question)
    if names:
        return names[-1]
    asked = (
        question.removesuffix("?").removesuffix(" hidden").removesuffix(" mentioned in the text")
    )
    return re.split(r" (?:the|for) ", asked)[-1]


def test_the_newest_of_two_statements_holds():
    for question in ask("corrections", count=40):
        [(start, end)] = question.evidence
        before, told, behind = (
            BASE.decode(part) for part in question.history.tensor_split((start, end))
        )
        about = subject(question.question)
        assert about in told
        assert about not in behind
        former = re.findall(rf"[^.]*\b{about}\b[^.]*\.", before)
        assert len(former) == 1
        assert not re.search(rf"\b{question.answers[0]}\b", former[0])


def test_a_synonym_question_shares_no_word_with_its_statement():
    common = {"the", "a", "is", "in", "of", "does", "on", "for", "with", "not", "to"}
    for question in ask("synonyms"):
        [(start, end)] = question.evidence
        told = set(re.findall(r"\w+", BASE.decode(question.history[start:end]).lower()))
        words = set(re.findall(r"\w+", question.question.lower()))
        assert not (told & words) - common


def test_keys_stand_on_lines_of_their_own():
    for question in ask("key_value", digits=4):
        [(start, end)] = question.evidence
        assert re.fullmatch(
            r"\nkey .+?(?:: | = | is )\d{4}", BASE.decode(question.history[start:end])
        )


def test_questions_about_one_history_share_it():
    asked = list(ask("planted", count=7, asked=3))
    owners = [id(question.history) for question in asked]
    assert [owners.count(owner) for owner in dict.fromkeys(owners)] == [3, 3, 1]
    first = asked[:3]
    assert len({question.evidence for question in first}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_asks_the_same(task):
    first, again = list(ask(task, count=3)), list(ask(task, count=3))
    for one, other in zip(first, again, strict=True):
        assert (one.question, one.answers, one.evidence) == (
            other.question, other.answers, other.evidence,
        )  # fmt: skip
        assert one.history.equal(other.history)
    assert [q.question for q in ask(task, count=3, length=6000)] == [q.question for q in first]
    assert [q.question for q in ask(task, count=3, seed=1)] != [q.question for q in first]


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="do not fit into a history of 100"):
        list(ask("planted", length=100))
    with pytest.raises(ConfigError, match="asked is 4, 3 facts allow 3"):
        ask("planted", facts=3, asked=4)
    with pytest.raises(ConfigError, match="asked is 3, 20 facts allow 2"):
        ask("corrections", asked=3)
