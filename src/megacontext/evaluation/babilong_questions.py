"""BABILong (arXiv 2406.10149): the bAbI test questions, their story spread over a book."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megacontext.errors import DataError
from megacontext.evaluation.babi import BabiQuestion, find_babi, read_babi
from megacontext.evaluation.long_questions import LongQuestion
from megacontext.evaluation.noise import NoiseTokens

BABILONG_TASKS = tuple(f"qa{number}" for number in range(1, 11))


def babilong_questions(
    noise: NoiseTokens, folder: Path, task: str, *, count: int, length: int, seed: int
) -> Iterator[LongQuestion]:
    """Test questions of one bAbI task, each with a history of its own, made when it is asked for.

    The sentences of the story stand in their order between sentences of noise. Which questions are
    drawn, and in which order, depends on the seed alone; those whose story is longer than the
    history are passed over.

    Args:
        noise: what the stories stand in.
        folder: the published bAbI v1.1 files.
        task: ``qa1`` to ``qa10``.
        count: how many questions at most; a file has a thousand.
        length: tokens of each history; 0 takes the story alone, which BABILong calls 0k.
        seed: of questions, noise and places.

    Raises:
        DataError: the file is not there, or every story is longer than the history.
    """
    path = find_babi(folder, task)
    questions = read_babi(path)
    labels = tuple(sorted({part for one in questions for part in one.answer.split(",")}))
    order = random.Random(f"babilong/{task}/{seed}").sample(range(len(questions)), len(questions))
    made = 0
    for number in order:
        if made == count:
            return
        asked = questions[number]
        rng = random.Random(f"babilong/{task}/{seed}/{number}")
        placed = _placed(noise, asked, rng, length)
        if placed is None:
            continue
        history, spans = placed
        made += 1
        yield LongQuestion(
            task=task,
            history=history,
            question=asked.question,
            answers=(asked.answer,),
            evidence=tuple(spans[index] for index in asked.evidence),
            metric="babilong",
            labels=labels,
        )
    if not made and count:
        raise DataError(f"{path}: no story fits a history of {length} tokens; lengthen it")


def _placed(
    noise: NoiseTokens, asked: BabiQuestion, rng: random.Random, length: int
) -> tuple[Tensor, list[tuple[int, int]]] | None:
    """The history and the span of each sentence; nothing where the story does not fit."""
    if length:
        story = [noise.encode(sentence) for sentence in asked.story]
        fits = sum(map(len, story)) <= length
        return noise.splice(rng, story, length) if fits else None
    first, *others = asked.story
    story = [noise.base.encode(first), *map(noise.encode, others)]
    ends = torch.tensor([len(sentence) for sentence in story]).cumsum(0).tolist()
    return torch.cat(story), list(zip([0, *ends[:-1]], ends, strict=True))
