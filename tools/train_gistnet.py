"""Trains a GistNet: ``python -m tools.train_gistnet --config configs/train/gistnet_tiny.yaml``."""

from __future__ import annotations

import logging
import sys
from typing import Any

from megacontext.training.texts import resolve_text
from megacontext.training.train_gistnet import GistTrainer, TrainGistNetConfig
from tools._entry import tool_main


def run(config: TrainGistNetConfig) -> dict[str, Any]:
    """Trains, or goes on with what lies in the output folder, and exports the GistNet."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    corpus = tuple(resolve_text(path) for path in config.corpus)
    trainer = GistTrainer(config.model_copy(update={"corpus": corpus}))
    return {"gistnet": str(trainer.run()), "steps": trainer.step}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Trains a GistNet for a frozen base model. An interrupted run goes on from its last "
        "checkpoint.",
        TrainGistNetConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
