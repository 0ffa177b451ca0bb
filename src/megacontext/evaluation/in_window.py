"""Answers of the base model when all it needs lies in its window."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megacontext.errors import InputError
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.plain_decode import decode_plain, raw_context
from megacontext.runtime.sampling import TokenSampler
from megacontext.tasks.documents import final_answer

_MOST_TOKENS = 64


def answers_exactly(base: BaseModel, prompt: str, answer: str) -> bool:
    """Whether greedy decoding after ``prompt`` writes a line that answers exactly ``answer``.

    Notes before the answer are allowed (:func:`megacontext.tasks.documents.final_answer`).

    Raises:
        InputError: the prompt is empty.
    """
    ids = base.encode(prompt)
    if not len(ids):
        raise InputError("the prompt is empty; ask something")
    target = base.encode(f" {answer}\n")
    # One forward finds an answer without notes: it is written if and only if, with it in place,
    # every one of its tokens is the likeliest.
    logits = base.prefill(raw_context(base, torch.cat((ids, target))[:-1]), keep=len(target)).logits
    if bool((logits.argmax(-1).cpu() == target).all()):
        return True
    written = decode_plain(
        base,
        base.prefill(raw_context(base, ids), keep=1),
        ids,
        TokenSampler(base.generation_config, do_sample=False),
        max_new_tokens=_MOST_TOKENS,
        stop="\n",
    )
    text = "".join(token.text for token in written)
    return final_answer(text) != text.strip() and final_answer(text) == answer


def accuracy(base: BaseModel, items: Sequence[tuple[str, str]]) -> list[bool]:
    """:func:`answers_exactly` of every ``(prompt, answer)``."""
    return [answers_exactly(base, prompt, answer) for prompt, answer in items]
