"""Configuration of GistNet."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megacontext.config import FrozenConfig

GistKind = Literal["mean", "transformer"]
ReaderKind = Literal["embedding", "kv"]
PoolingKind = Literal["mean", "slots"]


class GistNetConfig(FrozenConfig):
    """What a GistNet computes and how its gists are read.

    Attributes:
        kind: ``mean`` has no encoder parameters; ``transformer`` is learned.
        d_model: width of the base model's embeddings, and of the encoder.
        gist_width: numbers in a stored gist, 1 to 4 times ``d_model`` (default: ``d_model``).
        block_size: children of one gist.
        reader: ``embedding`` reads a gist as input embeddings, ``kv`` as keys and values.
        slots: entries a gist is read as, which is also its cost in the budget.
        rescale: give the mean of the children their mean norm (a mean of unlike vectors shrinks).
        n_layers: encoder layers.
        n_heads: attention heads of the encoder; each has an even number of dimensions.
        d_ff: inner width of the encoder's MLPs (default: 8/3 ``d_model``, rounded up to 8).
        context_tokens: tokens before the block that the encoder sees, a multiple of ``block_size``.
        pooling: ``mean`` over the block's states, or learned queries that attend to them.
        max_levels: highest level a learned GistNet can make or read.
        rope_theta: base of the encoder's rotary positions.
        reader_d_ff: inner width of the reader's residual MLP; 0 leaves it out.
        kv_layers: layers of the base model (``kv`` reader).
        kv_heads: its key/value heads (``kv`` reader).
        kv_head_dim: width of one key (``kv`` reader).
        kv_value_dim: width of one value (default: ``kv_head_dim``).
        kv_rank: rank of the maps from gist to keys and values; 0 is full rank.
        key_norm: normalise the keys, as a base model with QK-norm does.
        told_levels: levels that are told apart, by embeddings of their own; those above are encoded
            and read as the last one is. 0: all.
        feature_layers: layers of the frozen base that tokens pass before they are encoded; 0: the
            encoder reads input embeddings.
        feature_segment: tokens that those layers read together, a multiple of ``block_size``.
            Segments begin at its multiples in a history, and nothing before a segment is seen.
        init_seed: seed of the initial weights.
    """

    kind: GistKind = "mean"
    d_model: int = Field(ge=2, le=16384)
    gist_width: int = Field(default=0, ge=0, le=65536)
    block_size: int = Field(default=32, ge=2, le=1024)
    reader: ReaderKind = "embedding"
    slots: int = Field(default=1, ge=1, le=8)
    rescale: bool = False
    n_layers: int = Field(default=2, ge=1, le=48)
    n_heads: int = Field(default=4, ge=1, le=128)
    d_ff: int = Field(default=0, ge=0, le=65536)
    context_tokens: int = Field(default=256, ge=0, le=1024)
    pooling: PoolingKind = "mean"
    max_levels: int = Field(default=8, ge=1, le=64)
    rope_theta: float = Field(default=10_000.0, gt=1.0)
    reader_d_ff: int = Field(default=0, ge=0, le=65536)
    kv_layers: int = Field(default=0, ge=0, le=512)
    kv_heads: int = Field(default=0, ge=0, le=256)
    kv_head_dim: int = Field(default=0, ge=0, le=1024)
    kv_value_dim: int = Field(default=0, ge=0, le=1024)
    kv_rank: int = Field(default=0, ge=0, le=65536)
    key_norm: bool = False
    told_levels: int = Field(default=0, ge=0, le=64)
    feature_layers: int = Field(default=0, ge=0, le=512)
    feature_segment: int = Field(default=256, ge=2, le=65536)
    init_seed: int = Field(default=0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _fill_widths(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("d_model"), int):
            return values
        filled = dict(values)
        filled.setdefault("gist_width", filled["d_model"])
        filled.setdefault("d_ff", -(-filled["d_model"] * 8 // 24) * 8)
        filled.setdefault("kv_value_dim", filled.get("kv_head_dim", 0))
        return filled

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        if self.gist_width not in {self.d_model * factor for factor in (1, 2, 3, 4)}:
            raise ValueError(
                f"gist_width {self.gist_width} must be 1 to 4 times d_model {self.d_model}"
            )
        if self.kind == "mean" and self.gist_width != self.d_model:
            raise ValueError("kind 'mean' keeps the embedding width: gist_width must equal d_model")
        if self.kind == "transformer":
            self._check_encoder()
        if self.feature_layers and self.feature_segment % self.block_size:
            raise ValueError(
                f"feature_segment {self.feature_segment} must be a multiple of block_size "
                f"{self.block_size}"
            )
        if self.reader == "kv" and not (self.kv_layers and self.kv_heads and self.kv_head_dim):
            raise ValueError("reader 'kv' needs kv_layers, kv_heads and kv_head_dim")
        if self.reader == "kv" and not self.kv_value_dim:
            raise ValueError("reader 'kv' needs kv_value_dim of at least 1")
        return self

    def _check_encoder(self) -> None:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(
                f"n_heads {self.n_heads} must split d_model {self.d_model} into even widths"
            )
        if self.context_tokens % self.block_size:
            raise ValueError(
                f"context_tokens {self.context_tokens} must be a multiple of block_size "
                f"{self.block_size}"
            )
        if not self.d_ff:
            raise ValueError("d_ff must be at least 1")

    @property
    def width_factor(self) -> int:
        """How many embeddings fit into one gist."""
        return self.gist_width // self.d_model

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """Blocks before its own that each layer attends to; they sum to the context's blocks.

        Reach adds up over layers, so that with these windows a block sees exactly its context,
        however long the stream is that it was computed in.
        """
        share, rest = divmod(self.context_tokens // self.block_size, self.n_layers)
        return tuple(share + (layer < rest) for layer in range(self.n_layers))
