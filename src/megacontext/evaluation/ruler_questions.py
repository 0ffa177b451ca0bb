"""Questions of RULER over histories of any length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from megacontext.config import FrozenConfig
from megacontext.errors import InputError
from megacontext.evaluation.long_questions import LongQuestion
from megacontext.evaluation.noise import NoiseTokens
from megacontext.tasks.ruler import RulerTasks, RulerText, Wording

RulerTask = Literal[
    "niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"
]
_MOST_NEW_TOKENS: dict[RulerTask, int] = {
    "niah_single": 48,
    "niah_multikey": 48,
    "niah_multivalue": 128,
    "niah_multiquery": 128,
    "vt": 64,
    "cwe": 128,
    "fwe": 64,
}
# Below this length a list of common words repeats them less often, as published.
_SHORT_TOKENS = 4096
_FIT_ROUNDS = 8


class RulerConfig(FrozenConfig):
    """One task of RULER; the numbers are the published ones.

    Attributes:
        task: which.
        wording: the published one, or the one that the bundled model was trained on.
        digits: of a needle's number.
        keys: of ``niah_multikey`` (one is asked) and ``niah_multiquery`` (all are asked).
        values: of the key of ``niah_multivalue``.
        chains: of ``vt``; one is asked.
        hops: of a chain.
        depth: where the needle of ``niah_single`` stands, from 0 (start) to 1 (end); anywhere if
            none.
    """

    task: RulerTask
    wording: Wording = "ruler"
    digits: int = Field(default=7, ge=2, le=18)
    keys: int = Field(default=4, ge=2, le=10_000)
    values: int = Field(default=4, ge=2, le=100)
    chains: int = Field(default=1, ge=1, le=100)
    hops: int = Field(default=4, ge=1, le=100)
    depth: float | None = Field(default=None, ge=0, le=1)


def ruler_questions(
    noise: NoiseTokens, config: RulerConfig, *, count: int, length: int, seed: int
) -> Iterator[LongQuestion]:
    """Questions of one task, each with a history of its own, made when it is asked for.

    What is asked depends on the seed and the question's number alone, so that every length asks
    the same; only word counting has as many words as fit. Where these leave a rest of the length,
    noise stands before them.

    Args:
        noise: what the needles stand in.
        config: the task.
        count: how many questions.
        length: tokens of each history.
        seed: of everything.

    Raises:
        InputError: the statements are longer than the history.
    """
    for number in range(count):
        rng = random.Random(f"ruler/{config.task}/{seed}/{number}")
        if config.task in ("cwe", "fwe"):
            yield _counting(noise, config, rng, length)
        else:
            yield _finding(noise, config, rng, length)


def _finding(
    noise: NoiseTokens, config: RulerConfig, rng: random.Random, length: int
) -> LongQuestion:
    text = _statements(config, rng)
    depths = None
    if config.task == "niah_single" and config.depth is not None:
        depths = [config.depth]
    ids = [noise.encode(statement) for statement in text.statements]
    history, spans = noise.splice(rng, ids, length, depths=depths)
    return _question(config, text, history, tuple(spans[index] for index in text.evidence))


def _statements(config: RulerConfig, rng: random.Random) -> RulerText:
    tasks = RulerTasks(rng, config.wording)
    if config.task == "vt":
        return tasks.variable_tracking(chains=config.chains, hops=config.hops)
    several = config.task in ("niah_multikey", "niah_multiquery")
    return tasks.needles(
        keys=config.keys if several else 1,
        values=config.values if config.task == "niah_multivalue" else 1,
        queries=config.keys if config.task == "niah_multiquery" else 1,
        digits=config.digits,
    )


def _counting(
    noise: NoiseTokens, config: RulerConfig, rng: random.Random, length: int
) -> LongQuestion:
    state = rng.getstate()

    def make(words: int) -> RulerText:
        rng.setstate(state)
        tasks = RulerTasks(rng, config.wording)
        if config.task == "fwe":
            return tasks.frequent_words(words)
        if length < _SHORT_TOKENS:
            return tasks.common_words(words, repeats=6, other_repeats=1)
        return tasks.common_words(words)

    text, ids = _longest(noise, make, 100 if config.task == "fwe" else 11, length)
    rest = length - len(ids)
    history = torch.cat((noise.draw(rng, rest), ids))
    return _question(config, text, history, ((rest, length),))


def _longest(
    noise: NoiseTokens, make: Callable[[int], RulerText], fewest: int, length: int
) -> tuple[RulerText, Tensor]:
    """The text with as many words as ``length`` tokens hold, to within two in a hundred.

    Raises:
        InputError: the fewest words do not fit.
    """
    found: tuple[RulerText, Tensor] | None = None
    words, before = fewest, (0, 0)
    for _ in range(_FIT_ROUNDS):
        text = make(words)
        ids = noise.base.encode(f"\n\n{text.context}")
        tokens = len(ids)
        if tokens <= length and (found is None or tokens > len(found[1])):
            found = text, ids
        # A secant step that aims a little low, since words differ in length.
        per_word = max(0.1, (tokens - before[1]) / (words - before[0]))
        guess = max(fewest, words + int((length * 0.99 - tokens) / per_word))
        if guess == words or 0 <= length - tokens <= length // 50:
            break
        words, before = guess, (words, tokens)
    if found is None:
        raise InputError(
            f"a history of {length} tokens is too short for the words to count; lengthen it"
        )
    return found


def _question(
    config: RulerConfig, text: RulerText, history: Tensor, evidence: tuple[tuple[int, int], ...]
) -> LongQuestion:
    return LongQuestion(
        task=config.task,
        history=history,
        question=text.question,
        answers=text.answers,
        evidence=evidence,
        metric="all_of",
        max_new_tokens=_MOST_NEW_TOKENS[config.task],
    )
