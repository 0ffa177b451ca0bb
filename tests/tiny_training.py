"""A small corpus of simple English and training runs that take seconds, for tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from megacontext.training.train_base import TrainBaseConfig
from megacontext.training.train_gistnet import TrainGistNetConfig

_SUBJECTS = ("The fox", "A small girl", "The old king", "Nobody", "His brother", "The wind")
_VERBS = ("went to", "looked at", "spoke of", "feared", "remembered", "came from")
_OBJECTS = ("the river", "a dark wood", "the castle", "her mother", "the golden bird", "the sea")
_ENDS = (".", ".", ".", "!", ", and then it was night.", ' and said: "Wait for me."')


def write_corpus(folder: Path, documents: int = 20, sentences: int = 60) -> Path:
    """Writes ``corpus.txt`` and returns its path; the text is the same every time."""
    rng = random.Random("corpus")
    parts = (_SUBJECTS, _VERBS, _OBJECTS)
    texts = [
        " ".join(
            " ".join(rng.choice(words) for words in parts) + rng.choice(_ENDS)
            for _ in range(sentences)
        )
        for _ in range(documents)
    ]
    path = folder / "corpus.txt"
    path.write_text("\n<|endoftext|>\n".join(texts), encoding="utf-8")
    return path


def tiny_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Values of a :class:`TrainBaseConfig` with two layers of width 32; eight steps by default."""
    values: dict[str, Any] = {
        "output": folder / "run",
        "corpus": [folder / "corpus.txt"],
        "architecture": {
            "vocab_size": 512,
            "hidden_size": 32,
            "layers": 2,
            "heads": 2,
            "kv_heads": 1,
            "head_dim": 16,
            "intermediate_size": 48,
            "max_positions": 128,
        },
        "phases": [{"length": 48, "rows": 2, "steps": 4}, {"length": 64, "rows": 2, "steps": 4}],
        "optimizer": {"warmup_steps": 2},
        "mixed_precision": False,
        "workers": 0,
        "tokenizer_characters": 10_000,
        "log_every": 1,
        "probe_every": 1000,
        "probe_rows": 2,
        "checkpoint_every": 4,
    }
    return values | changes


def tiny_config(folder: Path, **changes: Any) -> TrainBaseConfig:
    return TrainBaseConfig.parse(tiny_run(folder, **changes))


def tiny_gist_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Values of a :class:`TrainGistNetConfig` for the base in ``folder / "base"``; eight steps."""
    values: dict[str, Any] = {
        "output": folder / "run",
        "model": str(folder / "base"),
        "corpus": [folder / "corpus.txt"],
        "gistnet": {"n_layers": 1, "context_tokens": 32, "slots": 2, "block_size": 16},
        "phases": [
            {"length": 64, "rows": 2, "steps": 4},
            {"length": 96, "rows": 2, "steps": 4, "replaced": [1, 2], "slots": [1, 2]},
        ],
        "optimizer": {"warmup_steps": 2},
        "mixed_precision": False,
        "workers": 0,
        "log_every": 1,
        "probe_every": 1000,
        "probe_batches": 1,
        "checkpoint_every": 4,
    }
    return values | changes


def tiny_gist_config(folder: Path, **changes: Any) -> TrainGistNetConfig:
    return TrainGistNetConfig.parse(tiny_gist_run(folder, **changes))
