"""What GistNet reads of tokens: their embeddings, or the base's hidden states a few layers up."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megacontext.errors import ConfigError, InputError, ModelError
from megacontext.gistnet import GistNet, GistNetConfig, Gists

if TYPE_CHECKING:
    from megacontext.runtime.base_model import BaseModel

_TOKENS_PER_PASS = 4096
# Matrix products of few rows round differently from those of many: with so many tokens per pass at
# least, a segment's features do not depend on how many others were computed with it.
_LEAST_TOKENS = 256

ReadTokens = Callable[[int, int], Tensor]
"""Token ids ``[n]`` of a history, from the first position to the second."""


class GistFeatures:
    """Vectors of tokens for a GistNet, as its configuration asks for them.

    With ``feature_layers`` 0 these are input embeddings. Otherwise they are the hidden states after
    so many of the base's layers, numbered as in prepared data sets: those after all layers come
    after the last norm too. Every segment of ``feature_segment`` tokens is read by itself, at
    positions from 0, so a token's features depend on nothing but the tokens of its segment up to
    itself, however a text was cut into commits.

    Nothing of the base is changed while it runs, so other threads may use it.

    Args:
        base: the frozen base model.
        config: the GistNet's.

    Raises:
        ConfigError: the base has too few layers or positions.
        ModelError: the base's first layers cannot be run alone.
    """

    def __init__(self, base: BaseModel, config: GistNetConfig) -> None:
        problem = features_misfit(config, base)
        if problem is not None:
            raise ConfigError(f"{problem}; use a GistNet made for {base.name}")
        self.base = base
        self.n_layers = config.feature_layers
        self.segment = config.feature_segment
        self._list_name = ""
        if 0 < self.n_layers < base.n_layers:
            self._list_name = _layer_list(base)

    def segment_start(self, position: int) -> int:
        """The position from which tokens are needed for the features of the one at ``position``."""
        return position - position % self.segment if self.n_layers else position

    def of(self, ids: Tensor) -> Tensor:
        """Features of tokens.

        Args:
            ids: int64 ``[..., n]``, each row of which begins where a segment does.

        Returns:
            ``[..., n, d_model]`` on the base's device, without gradients: usable in training.

        Raises:
            InputError: an id lies outside the base's vocabulary.
        """
        return self.over(self.base.embed(ids))

    @torch.no_grad()
    def over(self, embeddings: Tensor) -> Tensor:
        """As :meth:`of`, from input embeddings ``[..., n, d_model]`` that are at hand."""
        n, width = embeddings.shape[-2:]
        if not self.n_layers or not embeddings.numel():
            return embeddings
        # Whole segments: what is cut off, and causal masks hide, keeps all passes of one shape.
        padded = F.pad(embeddings, (0, 0, 0, -n % self.segment))
        rows = padded.reshape(-1, self.segment, width)
        per_pass = max(1, _TOKENS_PER_PASS // self.segment)
        states = torch.cat([self._run(part) for part in rows.split(per_pass)])
        return states.reshape(padded.shape)[..., :n, :]

    def _run(self, rows: Tensor) -> Tensor:
        """States of segments ``[s, feature_segment, d_model]``."""
        count = len(rows)
        missing = -(-_LEAST_TOKENS // self.segment) - count
        rows = F.pad(rows, (0, 0, 0, 0, 0, max(0, missing)))
        positions = torch.arange(self.segment, device=rows.device).expand(len(rows), -1)
        seen: list[Tensor] = []
        decoder: Any = self.base.model.get_decoder()
        if self._list_name:
            decoder = _first_layers(decoder, self._list_name, self.n_layers, seen)
        output = decoder(
            inputs_embeds=rows.to(self.base.dtype), position_ids=positions, use_cache=False
        )
        return (seen[0] if seen else output.last_hidden_state)[:count]


def encode_blocks(
    features: GistFeatures, gistnet: GistNet, read: ReadTokens, first: int, last: int
) -> Gists:
    """Level-1 gists of neighbouring blocks of one history.

    Args:
        features: what the GistNet reads of tokens.
        gistnet: the compressor.
        read: tokens of the history, also those before the blocks.
        first: number of the first block.
        last: number behind the last block, after ``first``.

    Raises:
        InputError: a token id lies outside the base's vocabulary.
    """
    size = gistnet.config.block_size
    begin = first * size
    start = features.segment_start(max(0, begin - gistnet.config.context_tokens))
    vectors = features.of(read(start, last * size).long())
    lead = begin - start
    return gistnet.encode_level(vectors[lead:], 1, vectors[:lead] if lead else None)


def features_misfit(config: GistNetConfig, base: BaseModel) -> str | None:
    """Why the base cannot give the features that a GistNet reads; ``None`` where it can."""
    if config.feature_layers > base.n_layers:
        return f"feature_layers is {config.feature_layers}, {base.name} has {base.n_layers} layers"
    if config.feature_layers and config.feature_segment > base.max_positions:
        return (
            f"feature_segment is {config.feature_segment}, {base.name} has {base.max_positions} "
            "positions"
        )
    return None


def require_features(gistnet: GistNet, features: Tensor | None, embeddings: Tensor) -> Tensor:
    """What a GistNet is given for tokens: ``features``, or ``embeddings`` if it reads those.

    Raises:
        InputError: it reads hidden states and there are none, or they have another shape.
    """
    if features is None:
        if gistnet.config.feature_layers:
            raise InputError(
                f"this GistNet reads the base's states after {gistnet.config.feature_layers} "
                "layers: give the features of the tokens beside their embeddings"
            )
        return embeddings
    if features.shape != embeddings.shape:
        raise InputError(
            f"features have shape {tuple(features.shape)}, expected that of the embeddings, "
            f"{tuple(embeddings.shape)}"
        )
    return features


def _layer_list(base: BaseModel) -> str:
    """Under which name the decoder keeps its layers."""
    children = base.model.get_decoder().named_children()
    names = [
        name
        for name, child in children
        if isinstance(child, nn.ModuleList) and len(child) == base.n_layers
    ]
    if len(names) != 1:
        raise ModelError(
            f"{base.name}: cannot tell the layers of {base.config.model_type} apart; use a GistNet "
            "with feature_layers 0"
        )
    return names[0]


def _first_layers(decoder: Any, name: str, n_layers: int, seen: list[Tensor]) -> Any:
    """A decoder of the first layers; its last one appends what it gives to ``seen``.

    It is another object with the same modules, so that neither the model nor other threads meet
    the shorter list or the hook.
    """
    layers = list(getattr(decoder, name))[:n_layers]
    layers[-1] = _twin(layers[-1], "_forward_hooks", OrderedDict)

    def record(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    layers[-1].register_forward_hook(record)
    shorter = _twin(decoder, "_modules", dict)
    setattr(shorter, name, nn.ModuleList(layers))
    return shorter


def _twin(module: Any, own: str, kind: Callable[[Any], Any]) -> Any:
    """A shallow copy of a module, with a registry of its own under the attribute ``own``."""
    twin = copy.copy(module)
    vars(twin)[own] = kind(vars(module)[own])
    return twin
