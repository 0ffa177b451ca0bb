"""How well every rival predicts a long stream of prose, block by block."""

from __future__ import annotations

import time
from collections.abc import Iterator

from torch import Tensor

from megacontext.errors import ConfigError
from megacontext.evaluation.baselines import Rival
from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.evaluation.proof_config import ProofSuiteConfig, tokens_of
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.tasks.corpus import held_out_documents

# More than a token of any text has; the rest of a book need not be tokenized.
_MOST_CHARACTERS_PER_TOKEN = 16


def prose_stream(base: BaseModel, config: ProofSuiteConfig) -> Tensor:
    """The beginning of the longest text that no training has seen, ``[prose]`` int64.

    Raises:
        ConfigError: it is shorter.
        DataError: a file of the corpus cannot be read.
    """
    wanted = tokens_of(config.prose)
    if config.corpus:
        text = max(held_out_documents(config.corpus, config.held_out_every), key=len)
    else:
        text = read_book(DemoConfig(model=config.model))
    ids = base.encode(text[: _MOST_CHARACTERS_PER_TOKEN * wanted])
    if len(ids) < wanted:
        raise ConfigError(
            f"prose is {config.prose}, the longest held-out text has {len(ids)} tokens; lower it "
            "or name a corpus with a longer one"
        )
    return ids[:wanted]


def positions(tokens: int, points: int, block_size: int) -> list[int]:
    """Where the blocks that are predicted begin: evenly spread, behind the first one."""
    blocks = tokens // block_size
    points = min(points, blocks - 1)
    return [(1 + point * (blocks - 1) // points) * block_size for point in range(points)]


def block_losses(
    rival: Rival, memory: Memory, starts: list[int]
) -> Iterator[tuple[int, float, float]]:
    """NLL of whole blocks given all before them, in ascending order as a stream comes.

    Yields:
        Where a block begins, nats per token, and the seconds it took.

    Raises:
        InputError: the rival cannot be asked here.
    """
    size = memory.identity.block_size
    for start in starts:
        targets = memory.tokens(start, start + size).long()
        began = time.perf_counter()
        loss = float(rival.nll(start, targets).mean())
        yield start, loss, time.perf_counter() - began
