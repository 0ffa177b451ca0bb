"""Random tiny Hugging Face models and a byte-level tokenizer, for tests.

The weights are larger than a fresh model's, so that attention is sharp and logits differ: a wrong
position, mask or layer changes the result by far more than any tolerance.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.cohere import CohereConfig
from transformers.models.gemma import GemmaConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gemma3 import Gemma3TextConfig
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mamba import MambaConfig
from transformers.models.mixtral import MixtralConfig
from transformers.models.qwen3 import Qwen3Config
from transformers.models.smollm3 import SmolLM3Config

VOCAB_SIZE = 258
_SPECIAL = {"bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_SPECIAL,
}
_SLIDING = {"sliding_window": 6}
_MIXED_LAYERS = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}

# Architectures that read gists through both readers.
CONFIGS: dict[str, Any] = {
    "llama": (LlamaConfig, {"head_dim": 8}),
    "llama-yarn": (LlamaConfig, {"rope_parameters": _YARN}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4}),
    "mixtral-sliding": (MixtralConfig, {"num_local_experts": 4, **_SLIDING}),
    "gemma": (GemmaConfig, {"head_dim": 16}),
    "gemma2": (Gemma2Config, {"head_dim": 16, **_SLIDING, **_MIXED_LAYERS}),
    "gemma3": (Gemma3TextConfig, {"head_dim": 16, **_SLIDING, **_MIXED_LAYERS}),
    "gpt-neox": (GPTNeoXConfig, {"num_key_value_heads": None}),
    "cohere": (CohereConfig, {"logit_scale": 1.0}),
}
ARCHITECTURES = tuple(CONFIGS)
# Absolute positions: input-embedding gists only. A state-space model: refused.
_OTHERS: dict[str, Any] = {
    "gpt2": (GPT2Config, {"num_key_value_heads": None}),
    "mamba": (MambaConfig, {"num_attention_heads": None, "num_key_value_heads": None}),
}


def tiny_config(architecture: str, max_positions: int = 128) -> Any:
    config_type, own = (CONFIGS | _OTHERS)[architecture]
    values = {key: value for key, value in (_COMMON | own).items() if value is not None}
    return config_type(**{**values, "max_position_embeddings": max_positions})


def tiny_model(
    architecture: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_positions: int = 128,
) -> Any:
    """A causal language model with random weights, in evaluation mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, max_positions))
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter)
                if parameter.ndim == 1:
                    parameter.add_(0.2 * noise)
                else:
                    parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
    )


def tiny_base_model(
    architecture: str = "qwen3",
    seed: int = 0,
    dtype: Any = torch.float32,
    max_positions: int = 128,
) -> Any:
    from megacontext.runtime.base_model import BaseModel

    model = tiny_model(architecture, seed, dtype, max_positions)
    return BaseModel(model, tiny_tokenizer(), f"tiny-{architecture}")


def save_tiny_model(
    folder: Path, architecture: str = "qwen3", seed: int = 0, max_positions: int = 128
) -> Path:
    """Writes model and tokenizer as ``save_pretrained`` does; returns the folder."""
    tiny_model(architecture, seed, max_positions=max_positions).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
