"""Rebuilds all gists of a memory for another GistNet or lens, from the tokens kept in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from megacontext.errors import MemoryMismatchError
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet
from megacontext.memory import Memory, MemoryIdentity
from megacontext.memory.identity import GistDtype
from megacontext.memory.number_formats import as_stored
from megacontext.memory.rebuild import GistBatch
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine
from megacontext.runtime.gist_builder import OVERLAP_TOKENS, overlapping_blocks
from megacontext.runtime.gist_features import GistFeatures, encode_blocks

_BLOCKS_PER_BATCH = 1024


def regist(
    base: BaseModel,
    memory: Memory,
    gistnet: GistNet,
    lens: LensNet | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    gist_dtype: GistDtype | None = None,
) -> None:
    """Replaces gists, keys and fidelities in one commit; tokens and sources stay as they are.

    Args:
        base: the memory's base model.
        memory: open for writing.
        gistnet: the new compressor.
        lens: makes the new keys, if any.
        progress: called with a level and how many of its gists a batch added.
        gist_dtype: the new number format; the memory's own if ``None``.

    Raises:
        MemoryMismatchError: the memory belongs to another base model, tokenizer or block size.
        MemoryStoreError: the disk failed; the memory is as it was.
        ConfigError: the base lacks the layers or positions that the GistNet's features need.
    """
    identity = Engine.identity(base, gistnet, lens)
    _require_same_base(memory, identity)
    gistnet = gistnet.to(base.device)
    size = gistnet.config.block_size
    dtype = memory.identity.gist_dtype if gist_dtype is None else gist_dtype
    features = GistFeatures(base, gistnet.config)

    def make(level: int, read: Callable[[int, int], Tensor]) -> Iterator[GistBatch]:
        total = memory.count(level)
        for first in range(0, total, _BLOCKS_PER_BATCH):
            last = min(total, first + _BLOCKS_PER_BATCH)
            children = read(first * size, last * size)
            with torch.inference_mode():
                if level == 1:
                    made = encode_blocks(features, gistnet, read, first, last)
                else:
                    made = gistnet.encode_level(children.to(base.device).float(), level)
                vectors = as_stored(made.vectors.cpu(), dtype)
                told = None
                if level == 1:
                    lead = read(max(0, first * size - OVERLAP_TOKENS), first * size)
                    told = overlapping_blocks(lead.long(), children.long(), size)
                levels = torch.full((len(vectors),), level)
                keys = None if lens is None else lens.encode_keys(vectors, levels, told)
            if progress is not None:
                progress(level, last - first)
            yield GistBatch(vectors, keys, made.fidelity.cpu())

    memory.replace_gists(
        make,
        gist_version=identity.gist_version,
        gist_width=identity.gist_width,
        key_width=identity.key_width,
        gist_dtype=dtype,
    )


def _require_same_base(memory: Memory, identity: MemoryIdentity) -> None:
    """Only the gists may be of another making."""
    have = memory.identity
    rebuilt = replace(
        have,
        gist_version=identity.gist_version,
        gist_width=identity.gist_width,
        key_width=identity.key_width,
    )
    difference = rebuilt.explain_difference(identity)
    if difference is not None:
        raise MemoryMismatchError(f"{memory.path.name}: {difference}")
