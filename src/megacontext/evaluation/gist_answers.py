"""Questions about facts that the model has only ever read as gists."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext.gistnet import GistNet
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.gist_features import GistFeatures
from megacontext.runtime.plain_decode import raw_context
from megacontext.tasks.documents import QUESTION_TEMPLATE, Piece
from megacontext.tasks.fact_themes import FactThemes
from megacontext.tasks.recall_documents import Prose, RecallDocuments

ARMS = ("full", "gist", "no_evidence")


@dataclass(frozen=True)
class FactQuestion:
    """A question and the text that holds the one fact it needs.

    Attributes:
        context: int64 ``[tokens]``, whole blocks.
        question: as the base model reads it.
        answer: expected.
        family: kind of fact.
    """

    context: Tensor
    question: str
    answer: str
    family: str


def single_fact_questions(
    base: BaseModel, prose: str, count: int, *, blocks: int, block_size: int, seed: int
) -> list[FactQuestion]:
    """Held-out facts scattered over held-out prose, one question each.

    Args:
        base: its tokenizer cuts the texts.
        prose: noise.
        count: how many questions.
        blocks: length of each text.
        block_size: tokens of a block.
        seed: of facts and noise.
    """
    noise = Prose([prose])
    found: list[FactQuestion] = []
    number = 0
    while len(found) < count:
        rng = random.Random(f"gist answers/{seed}/{number}")
        number += 1
        theme = FactThemes(rng, "held_out").plain(max(2, blocks // 2))
        documents = RecallDocuments(rng, noise, "held_out")
        question = rng.choice(theme.questions)
        theme.questions.clear()
        pieces = documents.scatter([theme], noise.slice(rng, blocks * block_size * 3))
        ids, end = _tokens(base, pieces, question.after - 1)
        if end <= blocks * block_size <= len(ids):
            text = QUESTION_TEMPLATE.format(question=question.text)
            context = ids[: blocks * block_size]
            found.append(FactQuestion(context, text, question.answer, question.family))
    return found


def _tokens(base: BaseModel, pieces: list[Piece], mark: int) -> tuple[Tensor, int]:
    """All tokens of a text and the end of statement ``mark``."""
    parts: list[Tensor] = []
    total, end = 0, 0
    for piece in pieces:
        parts.append(base.encode(piece.text))
        total += len(parts[-1])
        if piece.mark == mark and piece.kind == "statement":
            end = total
    return torch.cat(parts), end


@torch.inference_mode()
def answer_all(
    base: BaseModel,
    gistnet: GistNet,
    questions: list[FactQuestion],
    progress: Callable[[], None] | None = None,
) -> dict[str, list[bool]]:
    """Whether greedy decoding gives exactly the answer, by arm.

    ``full`` reads the text raw, ``gist`` its level-1 gists alone, ``no_evidence`` the question.
    """
    right: dict[str, list[bool]] = {arm: [] for arm in ARMS}
    for question in questions:
        contexts = {
            "full": raw_context(base, question.context),
            "gist": _gists(base, gistnet, question.context),
            "no_evidence": None,
        }
        for arm, context in contexts.items():
            right[arm].append(_is_right(base, context, question))
        if progress is not None:
            progress()
    return right


def _is_right(base: BaseModel, context: ContextInput | None, question: FactQuestion) -> bool:
    """Greedy decoding gives the answer if and only if its tokens are the likeliest in turn."""
    asked = base.encode(question.question)
    target = base.encode(f" {question.answer}\n")
    tokens = torch.cat((asked, target))[:-1]
    rows = base.embed(tokens)
    start = 0
    if context is not None:
        start = len(context)
    positions = torch.arange(start, start + len(tokens), device=rows.device)
    if context is None:
        joined = ContextInput(rows, positions)
    else:
        joined = ContextInput(
            torch.cat((context.embeddings, rows)),
            torch.cat((context.positions, positions)),
            context.gist_keys,
            context.gist_values,
            context.gist_positions,
        )
    logits = base.prefill(joined, keep=len(target)).logits
    return bool((logits.argmax(-1).cpu() == target).all())


def _gists(base: BaseModel, gistnet: GistNet, ids: Tensor) -> ContextInput:
    """All blocks as level-1 gists, at packed positions."""
    gists = gistnet.encode_level(GistFeatures(base, gistnet.config).of(ids), 1).vectors
    levels = torch.ones(len(gists), dtype=torch.int64, device=gists.device)
    positions = torch.arange(len(gists) * gistnet.cost, device=gists.device)
    if gistnet.config.reader == "embedding":
        rows = gistnet.read_embeddings(gists, levels).flatten(0, 1).to(base.dtype)
        return ContextInput(rows, positions)
    keys, values = gistnet.read_kv(gists, levels)
    return ContextInput(
        torch.empty(0, base.d_model, dtype=base.dtype, device=base.device),
        positions[:0],
        keys.flatten(1, 2).to(base.dtype),
        values.flatten(1, 2).to(base.dtype),
        positions,
    )
