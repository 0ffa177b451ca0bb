"""Makes the gists and index texts that a stretch of new tokens completes, level by level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet
from megacontext.memory import Memory
from megacontext.memory.number_formats import as_stored
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.gist_features import GistFeatures, encode_blocks

# The newest tokens of the block before join a block's index text, so that a word cut by the border
# is found whole and a sentence that starts just before it is found with its end.
OVERLAP_TOKENS = 8


@dataclass(frozen=True)
class BuiltGists:
    """What new tokens add to the tree.

    Attributes:
        gists: by level, ``[m, gist_width]``.
        keys: by level, ``[m, key_width]``; empty without a lens.
        fidelity: by level, ``[m]`` predicted KL cost in nats per token.
        block_texts: text of each completed block, for the lexical index.
    """

    gists: dict[int, Tensor]
    keys: dict[int, Tensor]
    fidelity: dict[int, Tensor]
    block_texts: list[str]


class GistBuilder:
    """Builds gists with one GistNet over one base model's embeddings or first layers.

    Args:
        base: the frozen base model; of it only the tokenizer, the embeddings and the layers that
            the GistNet asks for are used.
        gistnet: the compressor.
        lens: makes the keys stored beside the gists, on the CPU; ``None`` stores none.

    Raises:
        ConfigError: the base lacks the layers or positions that the GistNet's features need.
    """

    def __init__(self, base: BaseModel, gistnet: GistNet, lens: LensNet | None = None) -> None:
        self.base = base
        self.gistnet = gistnet
        self.lens = lens
        self.features = GistFeatures(base, gistnet.config)
        self.block_size = gistnet.config.block_size

    @torch.inference_mode()
    def build(self, memory: Memory, new_tokens: Tensor) -> BuiltGists:
        """The gists completed when ``new_tokens [n]`` follow what ``memory`` holds."""
        size = self.block_size
        first = memory.n_tokens // size
        open_tokens = memory.tokens(first * size, memory.n_tokens).long()
        tokens = torch.cat((open_tokens, new_tokens.long()))
        count = len(tokens) // size
        built = BuiltGists({}, {}, {}, [])
        if not count:
            return built

        def read(start: int, end: int) -> Tensor:
            before = memory.tokens(start, min(end, memory.n_tokens)).long()
            return torch.cat((before, new_tokens[: max(0, end - memory.n_tokens)].long()))

        # Gists are made from children as they are stored: what a level holds must not depend on how
        # the text was cut into commits.
        dtype = memory.identity.gist_dtype
        made = encode_blocks(self.features, self.gistnet, read, first, first + count)
        lead = read(max(0, first * size - OVERLAP_TOKENS), first * size)
        told = overlapping_blocks(lead, tokens[: count * size], size)
        self._add(built, 1, as_stored(made.vectors.cpu(), dtype), made.fidelity.cpu(), told)
        built.block_texts.extend(self.base.decode_batch([row[row >= 0].tolist() for row in told]))
        total = memory.n_tokens + len(new_tokens)
        level, width = 2, size**2
        while total // width > memory.n_tokens // width:
            start = memory.n_tokens // width * size
            children = torch.cat(
                (memory.gists(level - 1, start).float(), built.gists[level - 1].float())
            )
            whole = total // width * size - start
            made = self.gistnet.encode_level(children[:whole].to(self.base.device), level)
            self._add(built, level, as_stored(made.vectors.cpu(), dtype), made.fidelity.cpu())
            level, width = level + 1, width * size
        return built

    def _add(
        self,
        built: BuiltGists,
        level: int,
        vectors: Tensor,
        fidelity: Tensor,
        tokens: Tensor | None = None,
    ) -> None:
        built.gists[level] = vectors
        built.fidelity[level] = fidelity
        if self.lens is not None:
            levels = torch.full((len(vectors),), level)
            built.keys[level] = self.lens.encode_keys(vectors, levels, tokens)


def overlapping_blocks(lead: Tensor, tokens: Tensor, block_size: int) -> Tensor:
    """Blocks, each with the end of the one before, as index and keys tell them.

    Args:
        lead: int64 ``[l]``, the newest tokens before the first block, at most 8.
        tokens: int64 ``[n * block_size]``.
        block_size: tokens of a block.

    Returns:
        int64 ``[n, 8 + block_size]``; where a lead is shorter, -1.
    """
    missing = lead.new_full((OVERLAP_TOKENS - len(lead),), -1)
    line = torch.cat((missing, lead, tokens))
    return line.unfold(0, OVERLAP_TOKENS + block_size, block_size)
