"""Configuration of LensNet."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megacontext.config import FrozenConfig
from megacontext.lensnet.features import N_FEATURES


class LensNetConfig(FrozenConfig):
    """Sizes and switches of a LensNet.

    Attributes:
        d_model: width of the base model's hidden states and token embeddings.
        gist_width: numbers in a stored gist (default: ``d_model``).
        key_width: numbers in a stored lens key.
        n_queries: query vectors drawn from the tail.
        d_hidden: width of LensNet's own states.
        n_layers: rounds of cross-attention, each entries <- cache, then cache <- entries.
        n_heads: attention heads; must divide ``d_hidden``.
        d_ff: inner width of the MLPs.
        n_features: numbers that describe a span, see :mod:`megacontext.lensnet.features`.
        max_levels: highest level of a gist that a key can be made for.
        interaction: how the queries' dot products with a key become one relevance.
        key_vocabulary: tokens that have a key vector of their own, the size of the base model's
            vocabulary: a block's key starts from the sum over its tokens, a query from that over
            the tail's. 0: keys are made from gists and hidden states alone.
        lexical_prior: initial weight in nats of ``lexical_relative`` in a cache item's score, so
            that an untrained lens can follow the lexical policy; 0 starts calm.
        learned_prior: the same for ``learned_relative``, the closeness of a key.
        likelihood_prior: the same for ``likelihood_relative``.
        likelihoods: most proposals that the base model reads one by one with a question, to tell
            it how likely they make it; 0 for none.
        reads_attention: whether it is told how the base model attends to the working entries, which
            costs a forward over the window at every refocus, and entries propose themselves by it.
        gist_version: version of the GistNet whose gists it was trained on; empty where it was not.
        init_seed: seed of the initial weights.
    """

    d_model: int = Field(ge=2, le=16384)
    gist_width: int = Field(default=0, ge=1, le=65536)
    key_width: int = Field(default=64, ge=8, le=512)
    n_queries: int = Field(default=4, ge=1, le=64)
    d_hidden: int = Field(default=128, ge=8, le=4096)
    n_layers: int = Field(default=2, ge=1, le=24)
    n_heads: int = Field(default=4, ge=1, le=64)
    d_ff: int = Field(default=344, ge=1, le=16384)
    n_features: int = Field(default=N_FEATURES, ge=1, le=256)
    max_levels: int = Field(default=8, ge=1, le=64)
    interaction: Literal["max", "mean"] = "max"
    key_vocabulary: int = Field(default=0, ge=0, le=2**24)
    lexical_prior: float = Field(default=0.0, ge=0.0, le=10.0)
    learned_prior: float = Field(default=0.0, ge=0.0, le=10.0)
    likelihood_prior: float = Field(default=0.0, ge=0.0, le=10.0)
    likelihoods: int = Field(default=0, ge=0, le=256)
    reads_attention: bool = False
    gist_version: str = ""
    init_seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_widths(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "d_model" not in values:
            return values
        return {"gist_width": values["d_model"], **values}

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        if self.d_hidden % self.n_heads:
            raise ValueError(f"n_heads {self.n_heads} must divide d_hidden {self.d_hidden}")
        if self.n_features != N_FEATURES:
            raise ValueError(
                f"n_features is {self.n_features}, this version describes a span by {N_FEATURES}"
            )
        return self
