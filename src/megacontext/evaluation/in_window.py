"""Answers of the base model when all it needs lies in its window."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megacontext.errors import InputError
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput


def answers_exactly(base: BaseModel, prompt: str, answer: str) -> bool:
    """Whether greedy decoding after ``prompt`` writes exactly ``answer`` and ends the line.

    One forward tells: greedy decoding gives the answer if and only if, with the answer in place,
    every one of its tokens is the likeliest.

    Raises:
        InputError: the prompt is empty.
    """
    ids = base.encode(prompt)
    if not len(ids):
        raise InputError("the prompt is empty; ask something")
    target = base.encode(f" {answer}\n")
    tokens = torch.cat((ids, target))
    reading = ContextInput(base.embed(tokens[:-1]), torch.arange(len(tokens) - 1))
    logits = base.prefill(reading, keep=len(target)).logits
    return bool((logits.argmax(-1).cpu() == target).all())


def accuracy(base: BaseModel, items: Sequence[tuple[str, str]]) -> list[bool]:
    """:func:`answers_exactly` of every ``(prompt, answer)``."""
    return [answers_exactly(base, prompt, answer) for prompt, answer in items]
