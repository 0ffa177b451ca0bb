"""What MegaContext has to know of a Hugging Face architecture, read from the model itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from megacontext.errors import ModelError

LayerKind = Literal["full", "sliding"]

# Only these take an explicit additive mask, which gists and padding need.
MASKED_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Architecture:
    """The facts of one decoder-only model.

    Attributes:
        d_model: width of the input embeddings.
        n_layers: decoder layers.
        n_heads: query heads per layer.
        n_kv_heads: key/value heads per layer.
        head_dim: width of a key.
        value_dim: width of a value.
        max_positions: positions the model was trained for.
        vocab_size: rows of the input embedding.
        layer_kinds: per layer, whether it attends to everything or to a sliding window.
        sliding_window: width of that window in positions; ``None`` without sliding layers.
    """

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    value_dim: int
    max_positions: int
    vocab_size: int
    layer_kinds: tuple[LayerKind, ...]
    sliding_window: int | None

    @property
    def has_sliding_layers(self) -> bool:
        """Whether any layer sees a window only."""
        return "sliding" in self.layer_kinds


def read_architecture(model: Any, name: str) -> Architecture:
    """Reads the facts of ``model`` and refuses what the adapter cannot run.

    Raises:
        ModelError: the model is no decoder-only transformer with rotary-style KV attention, or it
            was loaded with an attention implementation that takes no explicit mask.
    """
    implementation = model.config._attn_implementation
    if implementation not in MASKED_ATTENTION:
        raise ModelError(
            f"{name}: attention implementation {implementation!r} takes no explicit mask; load the "
            "model with attn_implementation='sdpa'"
        )
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name}: an encoder-decoder; MegaContext needs a decoder-only model")
    if getattr(config, "hidden_size_per_layer_input", None):
        raise ModelError(
            f"{name}: {config.model_type} feeds token ids to every layer, so gists cannot stand "
            "in for tokens; choose another base model"
        )
    d_model = _fact(config, "hidden_size", name)
    n_heads = _fact(config, "num_attention_heads", name)
    n_layers = _fact(config, "num_hidden_layers", name)
    head_dim = getattr(config, "head_dim", None) or d_model // n_heads
    kinds = _layer_kinds(config, n_layers, name)
    return Architecture(
        d_model=model.get_input_embeddings().embedding_dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=getattr(config, "num_key_value_heads", None) or n_heads,
        head_dim=head_dim,
        value_dim=getattr(config, "v_head_dim", None) or head_dim,
        max_positions=_fact(config, "max_position_embeddings", name),
        vocab_size=model.get_input_embeddings().num_embeddings,
        layer_kinds=kinds,
        sliding_window=config.sliding_window if "sliding" in kinds else None,
    )


def attention_modules(model: Any, n_layers: int, name: str) -> list[nn.Module]:
    """The attention module of every layer, in order.

    Raises:
        ModelError: the model's layers do not each hold exactly one recognisable attention.
    """
    found: dict[int, nn.Module] = {}
    for module in model.get_decoder().modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and hasattr(module, "is_causal"):
            if index in found:
                break
            found[index] = module
    if sorted(found) != list(range(n_layers)):
        raise ModelError(
            f"{name}: cannot tell the attention modules of {model.config.model_type} apart; use "
            "another focus policy than 'attention' and the 'embedding' reader"
        )
    return [found[index] for index in range(n_layers)]


def _fact(config: Any, field: str, name: str) -> int:
    value = getattr(config, field, None)
    if not isinstance(value, int) or value < 1:
        raise ModelError(
            f"{name}: config of {config.model_type!r} has no usable {field}; MegaContext needs a "
            "decoder-only transformer with a key/value cache"
        )
    return value


def _layer_kinds(config: Any, n_layers: int, name: str) -> tuple[LayerKind, ...]:
    types = getattr(config, "layer_types", None)
    if types is None:
        window = getattr(config, "sliding_window", None)
        return (("full" if window is None else "sliding"),) * n_layers
    known: dict[str, LayerKind] = {"full_attention": "full", "sliding_attention": "sliding"}
    unknown = sorted(set(types) - set(known))
    if unknown:
        raise ModelError(
            f"{name}: layers of type {', '.join(unknown)} keep no plain key/value cache; choose a "
            "base model with full or sliding attention only"
        )
    return tuple(known[kind] for kind in types)
