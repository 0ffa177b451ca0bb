"""A memory made from a history that is tokens already."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine, EngineConfig
from megacontext.runtime.gist_builder import GistBuilder
from megacontext.runtime.ingest import Ingestor
from megacontext.telemetry import Telemetry


def remember(
    base: BaseModel,
    gistnet: GistNet | None,
    lens: LensNet | None,
    tokens: Tensor,
    path: Path,
) -> Memory:
    """Makes a memory of a history, with no more working memory than a chunk of it needs.

    Args:
        base: the base model; its embeddings and tokenizer are used.
        gistnet: makes the gists; the mean of a span's embeddings if none.
        lens: makes the keys stored beside them; none are stored if none.
        tokens: the history, token ids of ``base``, ``[n]`` int64 or int32.
        path: where the memory shall lie.

    Returns:
        The memory, open for writing; whoever called closes it.

    Raises:
        MemoryExistsError: something lies at ``path`` already.
        MemoryStoreError: it cannot be written; what was begun stays there.
    """
    net = (GistNet.untrained(base.d_model) if gistnet is None else gistnet).to(base.device)
    memory = Memory.create(path, Engine.identity(base, net, lens))
    try:
        ingestor = Ingestor(
            base,
            GistBuilder(base, net, lens),
            memory,
            Telemetry(),
            chunk_tokens=EngineConfig().chunk_tokens,
        )
        ingestor.ingest_tokens(tokens)
    except BaseException:
        memory.close()
        raise
    return memory
