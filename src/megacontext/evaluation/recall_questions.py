"""Facts planted in a long history: as they were said, in other words, corrected, or key by key."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, model_validator

from megacontext.config import FrozenConfig
from megacontext.evaluation.long_questions import LongQuestion
from megacontext.evaluation.noise import NoiseTokens
from megacontext.tasks.documents import Question, Theme
from megacontext.tasks.fact_themes import FactThemes
from megacontext.tasks.synonym_themes import SynonymThemes

RecallTask = Literal["planted", "synonyms", "corrections", "key_value"]
# About one fact in six is corrected.
_FACTS_PER_CORRECTION = 8


class RecallConfig(FrozenConfig):
    """What is planted and asked, all from the held-out part of the vocabulary.

    Attributes:
        task: ``planted``: numbers, hiding places and people, asked in words of the statement or
            nearly so. ``synonyms``: the question shares no content word with its statement.
            ``corrections``: what was stated is corrected later, and the newest holds.
            ``key_value``: lines ``key: number``.
        facts: planted in every history.
        asked: questions about every history.
        digits: of the numbers of ``key_value``.
    """

    task: RecallTask
    facts: int = Field(default=20, ge=1, le=10_000)
    asked: int = Field(default=1, ge=1)
    digits: int = Field(default=6, ge=2, le=18)

    @model_validator(mode="after")
    def _enough_facts(self) -> Self:
        most = self.facts
        if self.task == "corrections":
            most = max(1, self.facts // _FACTS_PER_CORRECTION)
        if self.asked > most:
            raise ValueError(f"asked is {self.asked}, {self.facts} facts allow {most}; raise facts")
        return self


def recall_questions(
    noise: NoiseTokens, config: RecallConfig, *, count: int, length: int, seed: int
) -> Iterator[LongQuestion]:
    """Questions about planted facts; a history is made when its first question is asked for.

    Questions about one history follow each other and hold the same tensor. What is planted and
    asked depends on the seed alone, so that every length asks the same.

    Args:
        noise: what the facts stand in.
        config: what is planted.
        count: how many questions.
        length: tokens of each history.
        seed: of everything.

    Raises:
        InputError: the statements are longer than the history.
    """
    made = number = 0
    while made < count:
        rng = random.Random(f"recall/{config.task}/{seed}/{number}")
        number += 1
        theme, questions = _drawn(config, rng)
        ids = [noise.encode(statement) for statement in theme.statements]
        history, spans = noise.splice(rng, ids, length)
        for asked in questions[: count - made]:
            made += 1
            yield LongQuestion(
                task=config.task,
                history=history,
                question=asked.text,
                answers=(asked.answer,),
                evidence=tuple(spans[index] for index in asked.needed),
                metric="exact",
            )


def _drawn(config: RecallConfig, rng: random.Random) -> tuple[Theme, list[Question]]:
    """A theme and, of its questions, as many as are asked, each about another fact."""
    while True:
        theme = _theme(config, rng)
        # One question for each fact; a corrected one has an older statement that must not be used.
        by_fact = {
            question.after: question
            for question in theme.questions
            if config.task != "corrections" or question.family == "correction"
        }
        if len(by_fact) >= config.asked:
            return theme, rng.sample(list(by_fact.values()), config.asked)


def _theme(config: RecallConfig, rng: random.Random) -> Theme:
    facts = FactThemes(rng, "held_out")
    if config.task == "planted":
        return facts.plain(config.facts)
    if config.task == "synonyms":
        return SynonymThemes(rng, "held_out").theme(config.facts)
    if config.task == "key_value":
        return facts.key_list(config.facts, config.digits)
    return rng.choice((facts.attributes, facts.codes, facts.hidings))(config.facts)
