"""Trains a base model: ``python -m tools.train_base --config configs/train/tiny_cpu.yaml``."""

from __future__ import annotations

import logging
import sys
from typing import Any

from megacontext.training.texts import resolve_text
from megacontext.training.train_base import BaseTrainer, TrainBaseConfig
from tools._entry import tool_main


def run(config: TrainBaseConfig) -> dict[str, Any]:
    """Trains, or goes on with what lies in the output folder, and exports the model."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    corpus = tuple(resolve_text(path) for path in config.corpus)
    trainer = BaseTrainer(config.model_copy(update={"corpus": corpus}))
    return {"model": str(trainer.run()), "steps": trainer.step}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Trains a base model and its tokenizer from scratch. An interrupted run goes on from its "
        "last checkpoint.",
        TrainBaseConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
