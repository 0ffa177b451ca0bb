"""The first stage of training LensNet: keys of blocks and queries of the tail find each other."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megacontext.config import FrozenConfig
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.gist_builder import overlapping_blocks
from megacontext.runtime.gist_features import GistFeatures
from megacontext.training.lens_texts import AskedText, LensTexts

# Prose is tokenized once, this many times what a batch takes, and each batch takes some slices.
_BANKED, _SLICES = 32, 8
# Relevance of what is no candidate: finite, so that a look without any has a gradient.
_NOTHING = -1e4


class KeyStageConfig(FrozenConfig):
    """The first stage.

    Attributes:
        steps: optimizer steps.
        texts: texts of a batch.
        tokens: length of a text; all its blocks are candidates of its questions, and its noise
            those of all others'.
        noise: tokens of further prose in a batch, whose blocks are candidates of all questions:
            in a long history a key must stand out from many thousands.
        facts: about how many statements a text holds.
        query_tokens: newest tokens of a question (and notes) that ask.
        probe_batches: batches of held-out texts in which the finished keys are measured.
    """

    steps: int = Field(default=600, ge=0)
    texts: int = Field(default=6, ge=1)
    tokens: int = Field(default=2048, ge=128)
    noise: int = Field(default=0, ge=0)
    facts: int = Field(default=16, ge=1)
    query_tokens: int = Field(default=64, ge=1)
    probe_batches: int = Field(default=12, ge=1)


@dataclass(frozen=True, eq=False)
class KeyBatch:
    """``n`` blocks of several texts and ``q`` looks into them.

    Attributes:
        texts: int64 ``[m]`` each, whole blocks.
        queries: int64 ``[q, t]``, padded in front.
        mask: bool ``[q, t]``, False for padding.
        evidence: bool ``[q, n]``.
        candidates: bool ``[q, n]``: evidence, and blocks that surely are none.
        families: ``[q]``.
    """

    texts: tuple[Tensor, ...]
    queries: Tensor
    mask: Tensor
    evidence: Tensor
    candidates: Tensor
    families: tuple[str, ...]


def key_batch(
    texts: Sequence[AskedText],
    base: BaseModel,
    *,
    block_size: int,
    query_tokens: int,
    noise: Sequence[Tensor] = (),
) -> KeyBatch:
    """Puts texts into one batch; looks without evidence are left out.

    Args:
        texts: what is asked about.
        base: its tokenizer.
        block_size: tokens of a block.
        query_tokens: newest tokens of a look that ask.
        noise: int64 ``[m]`` each, further prose whose blocks are candidates of every look.
    """
    texts = [*texts, *(AskedText(tokens, (), ()) for tokens in noise)]
    counts = [len(text.tokens) // block_size for text in texts]
    total = sum(counts)
    queries: list[Tensor] = []
    evidence: list[Tensor] = []
    candidates: list[Tensor] = []
    families: list[str] = []
    untold = torch.ones(total, dtype=torch.bool)
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    for first, count, text in zip(firsts, counts, texts, strict=True):
        untold[[first + block for block in text.told if block < count]] = False
    for first, count, text in zip(firsts, counts, texts, strict=True):
        for ask in text.asks:
            if not ask.evidence or ask.evidence[-1] >= count:
                continue
            wanted = torch.zeros(total, dtype=torch.bool)
            wanted[[first + block for block in ask.evidence]] = True
            others = untold.clone()
            others[first : first + count] = True
            others[[first + block for block in ask.related if block < count]] = False
            evidence.append(wanted)
            candidates.append(wanted | others)
            queries.append(base.encode(ask.query)[-query_tokens:])
            families.append(ask.family)
    longest = max((len(query) for query in queries), default=1)
    padded = torch.zeros(len(queries), longest, dtype=torch.int64)
    mask = torch.zeros(len(queries), longest, dtype=torch.bool)
    for row, query in enumerate(queries):
        padded[row, longest - len(query) :] = query
        mask[row, longest - len(query) :] = True
    nothing = torch.zeros(0, total, dtype=torch.bool)
    return KeyBatch(
        texts=tuple(
            text.tokens[: count * block_size] for text, count in zip(texts, counts, strict=True)
        ),
        queries=padded,
        mask=mask,
        evidence=torch.stack(evidence) if evidence else nothing,
        candidates=torch.stack(candidates) if candidates else nothing,
        families=tuple(families),
    )


class KeyRows(Dataset[KeyBatch]):
    """The batch of every step, a function of the texts' seed and the step.

    Args:
        texts: draws texts.
        base: its tokenizer.
        config: sizes.
        first: step at which index 0 stands.
    """

    def __init__(
        self, texts: LensTexts, base: BaseModel, config: KeyStageConfig, first: int = 0
    ) -> None:
        self.texts = texts
        self.base = base
        self.config = config
        self.first = first
        self._bank = torch.empty(0, dtype=torch.int64)
        if config.noise:
            rng = random.Random(f"lens keys/{texts.seed}/{texts.split}/noise")
            self._bank = base.encode(texts.noise(rng, _BANKED * config.noise))

    def __len__(self) -> int:
        return max(0, self.config.steps - self.first)

    def __getitem__(self, index: int) -> KeyBatch:
        step, config = self.first + index, self.config
        rng = random.Random(f"lens keys/{self.texts.seed}/{step}")
        drawn = [
            self.texts.draw(
                step * config.texts + number, config.tokens, rng.randint(2, 2 * config.facts)
            )
            for number in range(config.texts)
        ]
        return key_batch(
            drawn,
            self.base,
            block_size=self.texts.block_size,
            query_tokens=config.query_tokens,
            noise=self._noise(rng),
        )

    def _noise(self, rng: random.Random) -> list[Tensor]:
        """Slices of the bank at random places."""
        size = min(self.config.noise // _SLICES, len(self._bank))
        if not size:
            return []
        places = [rng.randrange(len(self._bank) - size + 1) for _ in range(_SLICES)]
        return [self._bank[place : place + size] for place in places]


def key_batches(rows: KeyRows, workers: int = 1) -> Iterator[KeyBatch]:
    """The batches of ``rows`` in order, built ahead by ``workers`` processes (0: by this one)."""
    yield from DataLoader(
        rows, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )


def relevances(base: BaseModel, gistnet: GistNet, lens: LensNet, batch: KeyBatch) -> Tensor:
    """How relevant every block is to every look, ``[q, n]``, with gradients to the lens."""
    size = gistnet.config.block_size
    features = GistFeatures(base, gistnet.config)
    gists: list[Tensor] = []
    told: list[Tensor] = []
    with torch.no_grad():
        for tokens in batch.texts:
            made = gistnet.encode_level(features.of(tokens.to(base.device)), 1)
            # As they will be stored.
            gists.append(made.vectors.half().float().cpu())
            told.append(overlapping_blocks(tokens[:0], tokens, size))
        hidden = _hidden(base, batch)
    vectors = torch.cat(gists)
    levels = torch.ones(len(vectors), dtype=torch.int64)
    keys = lens.encode_keys(vectors, levels, torch.cat(told))
    queries = lens.encode_queries(hidden, batch.mask, batch.queries)
    return lens.relevance(queries, keys)


def contrastive_loss(relevance: Tensor, batch: KeyBatch) -> Tensor:
    """InfoNCE (arXiv 1807.03748), once for every block of a look's evidence.

    A statement that crosses a border is in two blocks, and one of them without the other says
    nothing; so each has to stand out from what is no evidence by itself.
    """
    others = relevance.masked_fill(~batch.candidates | batch.evidence, _NOTHING)
    against = torch.logaddexp(others.logsumexp(dim=1, keepdim=True), relevance)
    losses = (against - relevance).masked_fill(~batch.evidence, 0.0)
    each = losses.sum(dim=1) / batch.evidence.sum(dim=1).clamp(min=1)
    # Statements that all stand in texts' open last blocks leave a batch without looks.
    return each.sum() / max(1, len(each))


def recall_at(relevance: Tensor, batch: KeyBatch, k: int) -> Tensor:
    """``[q]`` bool: whether all evidence is among the ``k`` most relevant candidates."""
    scores = relevance.masked_fill(~batch.candidates, -torch.inf)
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return batch.evidence.gather(1, best).sum(dim=1) == batch.evidence.sum(dim=1)


def weigh_by_rarity(lens: LensNet, texts: Sequence[Tensor], block_size: int) -> None:
    """Scales initial token keys by inverse document frequency, blocks being the documents.

    Args:
        lens: an untrained LensNet with ``key_vocabulary``.
        texts: int64 ``[m]`` each, prose to count in.
        block_size: tokens of a block.
    """
    if lens.token_keys is None:
        return
    counts = torch.zeros(lens.config.key_vocabulary)
    blocks = 0
    for tokens in texts:
        for block in tokens.split(block_size):
            counts[block.unique()] += 1
            blocks += 1
    rarity = torch.log((blocks + 1) / (counts + 0.5))
    with torch.no_grad():
        lens.token_keys.embed.weight.mul_((rarity / rarity.max()).clamp(min=0.0)[:, None])


def _hidden(base: BaseModel, batch: KeyBatch) -> Tensor:
    """``[q, t, d_model]`` final hidden states of the looks, each read alone; 0 on padding."""
    hidden = torch.zeros(*batch.queries.shape, base.d_model)
    lengths = batch.mask.sum(dim=1)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero()[:, 0]
        start = batch.queries.shape[1] - length
        ids = batch.queries[rows, start:]
        hidden[rows, start:] = base.features(ids).float().cpu()
    return hidden
