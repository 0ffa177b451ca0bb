"""Trains a LensNet: ``python -m tools.train_lensnet --config configs/train/lensnet_tiny.yaml``."""

from __future__ import annotations

import logging
import sys
from typing import Any

from megacontext.training.texts import resolve_text
from megacontext.training.train_lensnet import LensTrainer, TrainLensNetConfig
from tools._entry import tool_main


def run(config: TrainLensNetConfig) -> dict[str, Any]:
    """Trains, or goes on with what lies in the output folder, and exports the LensNet."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    corpus = tuple(resolve_text(path) for path in config.corpus)
    trainer = LensTrainer(config.model_copy(update={"corpus": corpus}))
    return {"lensnet": str(trainer.run()), "steps": trainer.done}


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Trains a LensNet for a frozen base model and its GistNet. An interrupted run goes on from "
        "its last checkpoint.",
        TrainLensNetConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
