"""A small corpus of simple English and training runs that take seconds, for tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from megacontext.training.train_base import TrainBaseConfig
from megacontext.training.train_gistnet import TrainGistNetConfig
from megacontext.training.train_lensnet import TrainLensNetConfig

_SUBJECTS = ("The fox", "A small girl", "The old king", "Nobody", "His brother", "The wind")
_VERBS = ("went to", "looked at", "spoke of", "feared", "remembered", "came from")
_OBJECTS = ("the river", "a dark wood", "the castle", "her mother", "the golden bird", "the sea")
_ENDS = (".", ".", ".", "!", ", and then it was night.", ' and said: "Wait for me."')


def corpus_documents(documents: int = 20, sentences: int = 60) -> list[str]:
    """Texts of simple sentences, the same every time."""
    rng = random.Random("corpus")
    parts = (_SUBJECTS, _VERBS, _OBJECTS)
    return [
        " ".join(
            " ".join(rng.choice(words) for words in parts) + rng.choice(_ENDS)
            for _ in range(sentences)
        )
        for _ in range(documents)
    ]


def write_corpus(folder: Path, documents: int = 20, sentences: int = 60) -> Path:
    """Writes ``corpus.txt`` and returns its path."""
    path = folder / "corpus.txt"
    texts = corpus_documents(documents, sentences)
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


def tiny_lens_run(folder: Path, **changes: Any) -> dict[str, Any]:
    """Values of a :class:`TrainLensNetConfig` for the base in ``folder / "base"``; two rounds.

    The base needs 512 positions, since one byte is one token here. The three sessions of a round
    are recorded in two parts.
    """
    session = {
        "sessions": 3, "sessions_per_part": 2, "tokens": [128], "facts": 1, "asks": 1, "rounds": 1,
        "calm": 1, "horizon": 4, "proposals": 2, "entries": 1,
    }  # fmt: skip
    values: dict[str, Any] = {
        "output": folder / "run",
        "model": str(folder / "base"),
        "corpus": [folder / "corpus.txt"],
        "lens": {"key_width": 16, "d_hidden": 16, "n_heads": 2, "d_ff": 16, "n_queries": 2},
        "keys": {"steps": 8, "texts": 2, "tokens": 192, "facts": 2, "probe_batches": 1},
        "rounds": [session, session],
        "scores": {"steps": 7, "batch_size": 4},
        "engine": {"budget": 384, "tail_tokens": 32, "query_tokens": 48},
        "key_optimizer": {"warmup_steps": 2, "adam_lr": 0.01, "muon_lr": 0.005},
        "score_optimizer": {"warmup_steps": 2, "adam_lr": 0.01, "muon_lr": 0.005},
        "workers": 0,
        "log_every": 2,
        "checkpoint_every": 3,
    }
    return values | changes


def tiny_lens_config(folder: Path, **changes: Any) -> TrainLensNetConfig:
    return TrainLensNetConfig.parse(tiny_lens_run(folder, **changes))
