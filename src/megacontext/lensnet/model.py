"""LensNet: where in the history detail is worth its cost."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from megacontext.checkpoints import PretrainedModule, seeded_init
from megacontext.config import FrozenConfig
from megacontext.errors import InputError
from megacontext.lensnet.blocks import CrossAttention, ResidualMLP, blank_padding
from megacontext.lensnet.config import LensNetConfig
from megacontext.lensnet.features import FEATURE_NAMES
from megacontext.lensnet.inputs import (
    CacheFeatures,
    EntryFeatures,
    Scores,
    TailStates,
    check_inputs,
    check_tail,
)
from megacontext.lensnet.keys import (
    KEYS_PER_CHUNK,
    KeyEncoder,
    QueryHead,
    TailEncoder,
    TokenGates,
    TokenKeys,
    relevance,
)
from megacontext.lensnet.legality import Legality, mask_scores


class LensNet(PretrainedModule[LensNetConfig]):
    """Focus scorer in two stages.

    *Where to look*: :meth:`encode_keys` gives every gist a small key, :meth:`encode_queries` draws
    queries from the tail, :meth:`relevance` compares them. *What to change*: :meth:`forward` lets
    working entries and gist cache read each other and the tail, and scores both. Cross-attention
    between chunks and neighbours as in RETRO (arXiv 2112.04426).

    The score of an untrained LensNet is 0 everywhere, apart from its priors.
    """

    model_type: ClassVar[str] = "megacontext-lensnet"
    config_type: ClassVar[type[FrozenConfig]] = LensNetConfig

    def __init__(self, config: LensNetConfig) -> None:
        super().__init__(config)
        self.token_keys: TokenKeys | None = None
        self.token_gates: TokenGates | None = None
        with seeded_init(config.init_seed):
            if config.key_vocabulary:
                self.token_keys = TokenKeys(config)
                self.token_gates = TokenGates(config)
            self.key_encoder = KeyEncoder(config)
            self.tail_encoder = TailEncoder(config)
            self.query_head = QueryHead(config)
            self.entry_input = SpanInput(config)
            self.cache_input = SpanInput(config)
            self.layers = nn.ModuleList(DualLayer(config) for _ in range(config.n_layers))
            self.entry_head = ScoreHead(config)
            self.cache_head = ScoreHead(config)
        with torch.no_grad():
            for name, prior in (
                ("lexical_relative", config.lexical_prior),
                ("learned_relative", config.learned_prior),
                ("likelihood_relative", config.likelihood_prior),
            ):
                self.cache_head.shortcut.weight[0, FEATURE_NAMES.index(name)] = prior

    def encode_keys(self, gists: Tensor, levels: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Makes the keys that are stored beside gists.

        Args:
            gists: ``[n, gist_width]``, any floating type.
            levels: int64 ``[n]``, from 1 to ``max_levels``.
            tokens: int64 ``[n, t]``, for a LensNet with ``key_vocabulary``: what the spans of
                level 1 say, negative where a row is shorter. Spans above are too long to be told
                by their tokens; they have none.

        Returns:
            ``[n, key_width]``, each of length 1.

        Raises:
            InputError: a shape, level or token does not fit.
        """
        config = self.config
        if gists.ndim != 2 or gists.shape[1] != config.gist_width or not gists.is_floating_point():
            raise InputError(
                f"gists are {gists.dtype} {tuple(gists.shape)}, expected floating "
                f"[n, {config.gist_width}]"
            )
        if levels.shape != gists.shape[:1]:
            raise InputError(f"levels have shape {tuple(levels.shape)}, expected [{len(gists)}]")
        if len(levels):
            low, high = (int(bound) for bound in levels.aminmax())
            if low < 1 or high > config.max_levels:
                raise InputError(
                    f"levels run from {low} to {high}, expected 1 to max_levels "
                    f"({config.max_levels})"
                )
        head_start = None
        if self.token_keys is not None and tokens is not None:
            self._check_tokens(tokens, len(gists))
            head_start = self.token_keys(tokens)
        return self.key_encoder(gists.to(self._dtype), levels, head_start)

    def encode_queries(
        self, tail_hidden: Tensor, tail_mask: Tensor, tokens: Tensor | None = None
    ) -> Tensor:
        """Draws queries from the tail.

        Args:
            tail_hidden: ``[b, t, d_model]``, the base model's hidden states, oldest first.
            tail_mask: bool ``[b, t]``, False for padding.
            tokens: int64 ``[b, t]``, the tail's tokens, for a LensNet with ``key_vocabulary``;
                padding is not looked at.

        Returns:
            ``[b, n_queries, key_width]``.

        Raises:
            InputError: a shape does not fit, or a LensNet with ``key_vocabulary`` gets no tokens.
        """
        config = self.config
        check_tail(config, tail_hidden, tail_mask)
        head_start = None
        if self.token_keys is not None and self.token_gates is not None:
            if tokens is None or tokens.shape != tail_mask.shape:
                raise InputError(
                    f"this LensNet has key_vocabulary on: give the tail's tokens, int64 "
                    f"{tuple(tail_mask.shape)}"
                )
            tokens = tokens.masked_fill(~tail_mask, -1)
            self._check_tokens(tokens, len(tail_mask))
            head_start = self.token_keys(tokens, self.token_gates(tail_hidden, tail_mask))
        return self.query_head(self.tail_encoder(tail_hidden, tail_mask), head_start)

    def relevance(self, queries: Tensor, keys: Tensor, *, chunk: int = KEYS_PER_CHUNK) -> Tensor:
        """Compares queries with keys, see :func:`megacontext.lensnet.keys.relevance`.

        Args:
            queries: ``[b, n_queries, key_width]``.
            keys: ``[n, key_width]`` or ``[b, n, key_width]``.
            chunk: keys per pass, which bounds the memory needed.

        Returns:
            ``[b, n]``.
        """
        return relevance(queries, keys, interaction=self.config.interaction, chunk=chunk)

    def forward(self, entries: EntryFeatures, cache: CacheFeatures, tail: TailStates) -> Scores:
        """Scores working entries and gist cache.

        Padding changes no score, and the order of entries or of cache items only the order of
        their scores.

        Raises:
            InputError: a shape does not fit.
        """
        scores = self.unmasked(entries, cache, tail)
        legality = Legality(entries.mask & entries.can_expand, entries.mask & entries.can_collapse)
        return Scores(mask_scores(scores.entry, legality), scores.cache)

    def unmasked(self, entries: EntryFeatures, cache: CacheFeatures, tail: TailStates) -> Scores:
        """The scores before illegal directions are set to 0, for training."""
        check_inputs(self.config, entries, cache, tail)
        tail_states = self.tail_encoder(tail.hidden, tail.mask)
        entry_states = self.entry_input(entries.vectors, entries.features, entries.mask)
        cache_states = self.cache_input(cache.vectors, cache.features, cache.mask)
        always = tail.mask.new_ones(tail_states.shape[:2])
        for layer in self.layers:
            entry_states, cache_states = layer(
                entry_states,
                torch.cat((entries.mask, always), dim=1),
                cache_states,
                torch.cat((cache.mask, always), dim=1),
                tail_states,
            )
        entry = self.entry_head(entry_states, entries.features, entries.mask)
        return Scores(entry, self.cache_head(cache_states, cache.features, cache.mask))

    @property
    def _dtype(self) -> torch.dtype:
        return self.query_head.map.weight.dtype

    def _check_tokens(self, tokens: Tensor, rows: int) -> None:
        limit = self.config.key_vocabulary
        if tokens.ndim != 2 or len(tokens) != rows or tokens.dtype != torch.int64:
            raise InputError(
                f"tokens are {tokens.dtype} {tuple(tokens.shape)}, expected int64 [{rows}, t]"
            )
        if tokens.numel() and int(tokens.max()) >= limit:
            raise InputError(
                f"token {int(tokens.max())} is outside key_vocabulary ({limit}); this LensNet was "
                "made for another base model"
            )


class SpanInput(nn.Module):
    """Vectors and features of spans to states."""

    def __init__(self, config: LensNetConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.gist_width)
        self.vectors = nn.Linear(config.gist_width, config.d_hidden, bias=False)
        self.features = nn.Linear(config.n_features, config.d_hidden)

    def forward(self, vectors: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """Maps ``[b, n, gist_width]`` and ``[b, n, n_features]`` to ``[b, n, d_hidden]``."""
        dtype = self.vectors.weight.dtype
        vectors = self.norm(blank_padding(vectors.to(dtype), mask))
        return self.vectors(vectors) + self.features(blank_padding(features.to(dtype), mask))


class DualLayer(nn.Module):
    """One round: entries read cache and tail, then the cache reads entries and tail."""

    def __init__(self, config: LensNetConfig) -> None:
        super().__init__()
        self.entry_attention = CrossAttention(config.d_hidden, config.n_heads)
        self.entry_mlp = ResidualMLP(config.d_hidden, config.d_ff)
        self.cache_attention = CrossAttention(config.d_hidden, config.n_heads)
        self.cache_mlp = ResidualMLP(config.d_hidden, config.d_ff)

    def forward(
        self, entries: Tensor, entry_mask: Tensor, cache: Tensor, cache_mask: Tensor, tail: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Updates ``entries [b, n, d_hidden]`` and ``cache [b, m, d_hidden]``.

        The masks, ``[b, n + n_queries]`` and ``[b, m + n_queries]``, cover the tail's states
        ``[b, n_queries, d_hidden]`` as well.
        """
        memory = torch.cat((cache, tail), dim=1)
        entries = self.entry_mlp(self.entry_attention(entries, memory, cache_mask))
        memory = torch.cat((entries, tail), dim=1)
        return entries, self.cache_mlp(self.cache_attention(cache, memory, entry_mask))


class ScoreHead(nn.Module):
    """States to a score, with a linear shortcut from the features; starts at zero."""

    def __init__(self, config: LensNetConfig) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_hidden)
        self.score = nn.Linear(config.d_hidden, 1)
        self.shortcut = nn.Linear(config.n_features, 1, bias=False)
        for parameter in (self.score.weight, self.score.bias, self.shortcut.weight):
            nn.init.zeros_(parameter)

    def forward(self, states: Tensor, features: Tensor, mask: Tensor) -> Tensor:
        """Maps ``[b, n, d_hidden]`` and ``[b, n, n_features]`` to ``[b, n]``, 0 on padding."""
        features = blank_padding(features.to(states.dtype), mask)
        score = self.score(self.norm(states)) + self.shortcut(features)
        return score.squeeze(-1).masked_fill(~mask, 0.0)
