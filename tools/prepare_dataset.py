"""Prepares training slices: ``python -m tools.prepare_dataset --config configs/data/toy.yaml``."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megacontext.training.prepare_dataset import PrepareDatasetConfig, prepare_dataset
from megacontext.training.prepare_dataset import Progress as Prepared
from tools._entry import tool_main


def run(config: PrepareDatasetConfig) -> dict[str, Any]:
    """Prepares the data set and sums it up."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[slices]} slices, {task.fields[shards]} shards"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task("preparing", total=None, slices=0, shards=0)

    def show(now: Prepared) -> None:
        bar.start()  # only now, so that an error before the first slice stands alone
        bar.update(
            task,
            completed=now.bytes_read,
            total=now.bytes_total,
            slices=now.slices,
            shards=now.shards,
        )

    try:
        manifest = prepare_dataset(config, on_progress=show)
    finally:
        if bar.live.is_started:
            bar.stop()
    recipe = manifest.recipe
    return {
        "output": str(config.output),
        "slices": manifest.n_slices,
        "shards": len(manifest.shards),
        "context_tokens": sum(shard.context_tokens for shard in manifest.shards),
        "documents_skipped": manifest.documents_skipped,
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "base_model": recipe.base_model,
        "tokenizer_hash": recipe.tokenizer_hash,
        "teacher_weights": recipe.teacher.weights if recipe.teacher else None,
    }


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    return tool_main(
        "Cuts a corpus into context slices with the tokens that follow them and the frozen base "
        "model's hidden states. An interrupted run goes on where it ended.",
        PrepareDatasetConfig,
        run,
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
