"""Text to token ids and back, whatever the text holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor


def encode_text(tokenizer: Any, text: str) -> Tensor:
    """Token ids ``[n]`` int64, without special tokens.

    Unpaired surrogates, which no encoding can hold, are read as U+FFFD.
    """
    readable = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    ids = tokenizer(readable, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return torch.tensor(ids["input_ids"], dtype=torch.int64)


def decode_ids(tokenizer: Any, ids: Tensor | Sequence[int]) -> str:
    """The text of token ids, special tokens included."""
    return tokenizer.decode(
        id_list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def id_list(ids: Tensor | Sequence[int]) -> list[int]:
    """Token ids as plain integers."""
    if isinstance(ids, Tensor):
        ids = cast(list[int], ids.tolist())  # pyright: ignore[reportUnknownMemberType]
    return [int(token) for token in ids]


def hash_tokenizer(tokenizer: Any) -> str:
    """16 hexadecimal digits that change with anything that changes token ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state: dict[str, Any] = {
            "vocab": tokenizer.get_vocab(),
            "special": tokenizer.special_tokens_map,
        }
    else:
        state = json.loads(backend.to_str())
        # Set by the last call, not by the tokenizer.
        state.pop("truncation", None)
        state.pop("padding", None)
    text = json.dumps(state, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
