"""What a GistNet is trained for: the frozen model should read on as if nothing had been replaced.

The loss that counts is the KL divergence from the base model that read everything raw to the same
model reading gists in place of some blocks, at every raw token behind a gist. Reconstruction and
contrast are options beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from megacontext.checkpoints import seeded_init
from megacontext.config import FrozenConfig
from megacontext.gistnet import GistNet
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.gist_features import GistFeatures
from megacontext.runtime.history_buffers import HistoryBuffers
from megacontext.runtime.window_batch import plain_states, window_states
from megacontext.runtime.window_layout import WindowLayout


class ObjectiveConfig(FrozenConfig):
    """Weights of the loss's terms.

    Attributes:
        fidelity_weight: of the error of predicted fidelity, where a window has a single gist.
        fidelity_horizon: tokens behind the gist over which its true KL cost is the mean.
        state_weight: of the distance between final hidden states, in units of the teacher's size;
            every token behind a gist counts the same, whatever its weight.
        reconstruction_weight: of naming a block's tokens from its gist alone (a bag of words).
        contrast_weight: of telling a block's gist from those of other blocks by the base's mean
            hidden state over the block (InfoNCE, arXiv 1807.03748).
        least_weight: least weight of a token, since prose and answers say more than the statements
            of generated texts, which cannot be foreseen.
    """

    fidelity_weight: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    fidelity_horizon: int = Field(default=64, ge=1)
    state_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    reconstruction_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    contrast_weight: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    least_weight: float = Field(default=0.2, ge=0, allow_inf_nan=False)


@dataclass(frozen=True, eq=False)
class GistBatch:
    """A training batch.

    Attributes:
        ids: int64 ``[batch, tokens]``, whole blocks.
        weights: float32 ``[batch, tokens]``, how much predicting this very token counts.
        levels: int64 ``[batch, blocks]``, the level each block is read at.
        slots: entries every gist of the batch is read as; ``None``: all it has.
        teacher: ``[batch, tokens, d_model]`` final hidden states of the base that read everything
            raw; ``None``: they are computed.
    """

    ids: Tensor
    weights: Tensor
    levels: Tensor
    slots: int | None = None
    teacher: Tensor | None = None

    def to(self, device: torch.device) -> GistBatch:
        """The batch on another device."""
        teacher = None if self.teacher is None else self.teacher.to(device)
        return GistBatch(
            self.ids.to(device),
            self.weights.to(device),
            self.levels.to(device),
            self.slots,
            teacher,
        )


class GistObjective(nn.Module):
    """The loss of a batch; a module, so that data-parallel wrappers can hold it.

    Args:
        base: the frozen base model, on the device of the training. It is no submodule: it is
            neither trained nor saved.
        gistnet: what is trained.
        config: weights of the terms.
        compile: compile the base's decoder.

    Raises:
        ConfigError: the base lacks the layers or positions that the GistNet's features need.
    """

    def __init__(
        self, base: BaseModel, gistnet: GistNet, config: ObjectiveConfig, *, compile: bool = False
    ) -> None:
        super().__init__()
        self.gistnet = gistnet
        self.config = config
        self.features = GistFeatures(base, gistnet.config)
        width = gistnet.config.gist_width
        self.bag: nn.Linear | None = None
        self.match: nn.Linear | None = None
        with seeded_init(gistnet.config.init_seed):
            if config.reconstruction_weight:
                self.bag = nn.Linear(width, base.d_model, bias=False)
            if config.contrast_weight:
                self.match = nn.Linear(width, base.d_model, bias=False)
        decoder: Callable[..., Any] = base.model.get_decoder()
        if compile:
            # One kernel a shape: with dynamic ones a resumed run would compile another.
            decoder = torch.compile(decoder, dynamic=False)
        # In a tuple, so that torch does not take the base for a submodule.
        self._frozen = (base, decoder)

    def forward(self, batch: GistBatch) -> dict[str, Tensor]:
        """Scalar terms of the loss: ``loss`` (their weighted sum), ``kl``, and those in use."""
        base, decoder = self._frozen
        embeddings = base.embed(batch.ids)
        teacher = batch.teacher
        if teacher is None:
            with torch.no_grad():
                positions = torch.arange(batch.ids.shape[1], device=batch.ids.device)
                teacher = plain_states(
                    base, embeddings, positions.expand_as(batch.ids), decoder=decoder
                )
        deepest = int(batch.levels.max())
        buffers = HistoryBuffers.encode(
            self.gistnet,
            embeddings,
            levels=max(1, deepest),
            features=self.features.over(embeddings),
        )
        layout = WindowLayout.of(
            batch.levels, block_size=buffers.block_size, slots=batch.slots or self.gistnet.cost
        )
        states = window_states(base, self.gistnet, buffers, layout, decoder=decoder)
        kl, weights, apart = self._divergence(states, teacher, layout, batch.weights)
        terms = {"kl": (kl * weights).sum() / weights.sum().clamp(min=1e-9)}
        loss = terms["kl"]
        if self.config.state_weight:
            terms["states"] = apart
            loss = loss + self.config.state_weight * apart
        if layout.n_gists == 1 and self.config.fidelity_weight:
            terms["fidelity"] = self._fidelity(kl.detach(), weights, buffers, layout)
            loss = loss + self.config.fidelity_weight * terms["fidelity"]
        if self.bag is not None:
            terms["reconstruction"] = self._reconstruction(self.bag, buffers, batch.ids)
            loss = loss + self.config.reconstruction_weight * terms["reconstruction"]
        if self.match is not None:
            terms["contrast"] = self._contrast(self.match, buffers, teacher)
            loss = loss + self.config.contrast_weight * terms["contrast"]
        return {"loss": loss, **terms}

    def _divergence(
        self, states: Tensor, teacher: Tensor, layout: WindowLayout, weights: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """KL in nats of the next token at every raw row, and its weight; 0 before any gist.

        Returns:
            Both float32 ``[batch, raw]``, and the mean relative distance of the final states there,
            a scalar.
        """
        # The row of token i predicts token i + 1, whatever of it the window reads.
        following = F.pad(weights[:, 1:], (0, 1)).clamp(min=self.config.least_weight)
        following[:, -1] = 0.0
        scored = following.gather(1, layout.tokens) * (layout.seen > 0)
        chosen = scored > 0
        index = layout.tokens[..., None].expand(-1, -1, teacher.shape[-1])
        reference = teacher.gather(1, index)[chosen]
        head = self._frozen[0].model.lm_head
        given = F.log_softmax(head(states[chosen]).float(), dim=-1)
        with torch.no_grad():
            wanted = F.log_softmax(head(reference.to(states.dtype)).float(), dim=-1)
        divergence = torch.zeros_like(scored)
        divergence[chosen] = F.kl_div(given, wanted, log_target=True, reduction="none").sum(-1)
        distance = (states[chosen].float() - reference.float()).pow(2).sum(-1)
        return divergence, scored, (distance / reference.float().pow(2).sum(-1)).mean()

    def _fidelity(
        self, kl: Tensor, weights: Tensor, buffers: HistoryBuffers, layout: WindowLayout
    ) -> Tensor:
        """Error of the predicted cost of each window's only gist, in the logarithm."""
        behind = (layout.seen > 0).cumsum(dim=1)
        # Rows of no weight have no measured divergence.
        near = (behind > 0) & (behind <= self.config.fidelity_horizon) & (weights > 0)
        measured = (kl * near).sum(1) / near.sum(1).clamp(min=1)
        predicted = buffers.fidelity.gather(1, layout.gists)[:, 0].float()
        known = near.any(dim=1)
        error = ((predicted + 1e-4).log() - (measured + 1e-4).log()).square()
        return (error * known).sum() / known.sum().clamp(min=1)

    def _reconstruction(self, bag: nn.Linear, buffers: HistoryBuffers, ids: Tensor) -> Tensor:
        """Mean NLL of the tokens of every block, drawn from its level-1 gist in any order."""
        base = self._frozen[0]
        gists = buffers.gists[:, : buffers.n_blocks]
        table = base.model.get_input_embeddings().weight
        read = F.rms_norm(bag(gists), (base.d_model,))
        likelihood = F.log_softmax((read @ table.to(read.dtype).T).float(), dim=-1)
        return -likelihood.gather(-1, ids.unflatten(1, (-1, buffers.block_size))).mean()

    def _contrast(self, match: nn.Linear, buffers: HistoryBuffers, teacher: Tensor) -> Tensor:
        """InfoNCE between level-1 gists and the base's mean states over their own blocks."""
        gists = F.normalize(match(buffers.gists[:, : buffers.n_blocks]).flatten(0, 1).float())
        means = teacher.unflatten(1, (-1, buffers.block_size)).mean(2).flatten(0, 1).float()
        similarity = gists @ F.normalize(means).T / 0.07
        return F.cross_entropy(similarity, torch.arange(len(gists), device=similarity.device))
