"""The shape of a LensNet that is to be trained."""

from __future__ import annotations

from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet, LensNetConfig
from megacontext.runtime.base_model import BaseModel


class LensShapeConfig(FrozenConfig):
    """What a new LensNet looks like; the rest follows from the base model and the GistNet.

    Attributes:
        key_width: numbers of a stored key.
        n_queries: queries drawn from the tail.
        d_hidden: width of its own states.
        n_layers: rounds of cross-attention.
        n_heads: attention heads.
        d_ff: inner width of its MLPs.
        token_keys: whether every token of the vocabulary has a key vector.
        lexical_prior: nats that the best lexical hit counts before any training.
        learned_prior: nats that the block with the closest key counts before any training.
        likelihood_prior: nats that the block counts which makes a question likeliest.
        likelihoods: most proposals that the base reads one by one with a question.
        reads_attention: whether it is told how the base attends to the working entries.
    """

    key_width: int = Field(default=96, ge=8, le=512)
    n_queries: int = Field(default=4, ge=1, le=64)
    d_hidden: int = Field(default=64, ge=8)
    n_layers: int = Field(default=1, ge=1)
    n_heads: int = Field(default=4, ge=1)
    d_ff: int = Field(default=128, ge=1)
    token_keys: bool = True
    lexical_prior: float = Field(default=1.0, ge=0, le=10)
    learned_prior: float = Field(default=1.0, ge=0, le=10)
    likelihood_prior: float = Field(default=4.0, ge=0, le=10)
    likelihoods: int = Field(default=16, ge=0, le=256)
    reads_attention: bool = False

    def build(self, base: BaseModel, gistnet: GistNet, seed: int) -> LensNet:
        """A LensNet of this shape for a base and its gists, with initial weights."""
        values = self.model_dump(exclude={"token_keys"})
        values |= {
            "d_model": base.d_model,
            "gist_width": gistnet.config.gist_width,
            "gist_version": gistnet.version,
            "key_vocabulary": base.vocab_size if self.token_keys else 0,
            "init_seed": seed,
        }
        return LensNet(LensNetConfig.parse(values, where="lens"))
