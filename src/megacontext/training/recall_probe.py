"""How well a base model answers from its window, by family of question and by distance."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megacontext.tasks.recall_documents import RecallDocuments
from megacontext.training.lm_batches import RowSampler


@dataclass(frozen=True)
class ProbeReport:
    """Shares of answers that are right in every token, and of first tokens that are right.

    Args:
        exact: by family.
        first: first-token accuracy by distance bucket (tokens between evidence and answer); the
            last bucket has no upper bound.
        prose_nll: nats per token of running prose.
        count: number of answers.
    """

    exact: dict[str, float]
    first: dict[str, float]
    prose_nll: float
    count: int


_BUCKETS = (32, 64, 128, 256, 512, 1024, 2048)
_BEYOND = f">{_BUCKETS[-1]}"


@torch.inference_mode()
def probe_recall(
    model: nn.Module, sampler: RowSampler, *, length: int, rows: int, seed: int = 10**6
) -> ProbeReport:
    """Greedy, teacher-forced accuracy on held-out names in documents of up to ``length`` tokens.

    Args:
        model: causal language model; ids go to the device of its parameters.
        sampler: gives tokenizer and prose.
        length: longest document.
        rows: number of documents.
        seed: picks the documents; the same ones on every call.
    """
    device = next(model.parameters()).device
    exact: dict[str, list[bool]] = defaultdict(list)
    first: dict[str, list[bool]] = defaultdict(list)
    prose: list[float] = []
    for number in range(rows):
        rng = random.Random(f"probe/{seed}/{number}")
        documents = RecallDocuments(rng, sampler.prose, "held_out")
        pieces = documents.draw(rng.randint(length // 3, length))
        encoded = list(sampler.encode(pieces))
        ids = torch.tensor([i for piece_ids, _ in encoded for i in piece_ids][:length])
        logits: Tensor = model(input_ids=ids[None].to(device)).logits[0].cpu()
        right = torch.cat([torch.tensor([False]), logits[:-1].argmax(-1) == ids[1:]])
        nll = nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
        position = 0
        marks: dict[int, int] = {}
        for piece, (piece_ids, _) in zip(pieces, encoded, strict=True):
            end = position + len(piece_ids)
            if end > len(ids):
                break
            if piece.kind == "statement":
                marks[piece.mark] = end
            elif piece.kind == "prose" and position > 0:
                prose.append(float(nll[position - 1 : end - 1].mean()))
            elif piece.kind == "answer":
                exact[piece.family].append(bool(right[position:end].all()))
                if piece.mark in marks:
                    gap = position - marks[piece.mark]
                    bucket = next((f"<={b}" for b in _BUCKETS if gap <= b), _BEYOND)
                    first[bucket].append(bool(right[position]))
            position = end
    return ProbeReport(
        exact={family: sum(hits) / len(hits) for family, hits in sorted(exact.items())},
        first={b: _mean(first[b]) for b in (*(f"<={b}" for b in _BUCKETS), _BEYOND) if first[b]},
        prose_nll=_mean(prose),
        count=sum(len(hits) for hits in exact.values()),
    )


def _mean(values: list[bool] | list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
