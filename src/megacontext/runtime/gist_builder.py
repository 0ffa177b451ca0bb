"""Makes the gists and index texts that a stretch of new tokens completes, level by level."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext.errors import ConfigError
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel

# The newest tokens of the block before join a block's index text, so that a word cut by the border
# is found whole and a sentence that starts just before it is found with its end.
_OVERLAP_TOKENS = 8
_STORED = {"fp16": torch.float16, "bf16": torch.bfloat16}


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
    """Builds gists with one GistNet over one base model's embeddings.

    Args:
        base: the frozen base model; only its embeddings and tokenizer are used.
        gistnet: the compressor.
        lens: makes the keys stored beside the gists, on the CPU; ``None`` stores none.

    Raises:
        ConfigError: the lens needs summaries for its keys, which are not made here.
    """

    def __init__(self, base: BaseModel, gistnet: GistNet, lens: LensNet | None = None) -> None:
        if lens is not None and lens.config.key_summary:
            raise ConfigError(
                "the LensNet has key_summary on: its keys need summaries, which only training "
                "makes; train one with key_summary=false"
            )
        self.base = base
        self.gistnet = gistnet
        self.lens = lens
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
        reach = self.gistnet.config.context_tokens
        before = memory.tokens(max(0, first * size - reach), first * size).long()
        # Gists are made from children as they are stored: what a level holds must not depend on how
        # the text was cut into commits.
        stored = _STORED[memory.identity.gist_dtype]
        made = self.gistnet.encode_level(
            self.base.embed(tokens[: count * size]),
            1,
            self.base.embed(before) if len(before) else None,
        )
        self._add(built, 1, made.vectors.to("cpu", stored), made.fidelity.cpu())
        built.block_texts.extend(self._texts(memory, first, tokens, count))
        total = memory.n_tokens + len(new_tokens)
        level, width = 2, size**2
        while total // width > memory.n_tokens // width:
            start = memory.n_tokens // width * size
            children = torch.cat(
                (memory.gists(level - 1, start).float(), built.gists[level - 1].float())
            )
            whole = total // width * size - start
            made = self.gistnet.encode_level(children[:whole].to(self.base.device), level)
            self._add(built, level, made.vectors.to("cpu", stored), made.fidelity.cpu())
            level, width = level + 1, width * size
        return built

    def _add(self, built: BuiltGists, level: int, vectors: Tensor, fidelity: Tensor) -> None:
        built.gists[level] = vectors
        built.fidelity[level] = fidelity
        if self.lens is not None:
            levels = torch.full((len(vectors),), level)
            built.keys[level] = self.lens.encode_keys(vectors, levels)

    def _texts(self, memory: Memory, first: int, tokens: Tensor, count: int) -> list[str]:
        size = self.block_size
        lead = min(_OVERLAP_TOKENS, first * size)
        ids = torch.cat((memory.tokens(first * size - lead, first * size).long(), tokens)).tolist()
        blocks = [
            ids[max(0, lead + i * size - _OVERLAP_TOKENS) : lead + (i + 1) * size]
            for i in range(count)
        ]
        return self.base.decode_batch(blocks)
