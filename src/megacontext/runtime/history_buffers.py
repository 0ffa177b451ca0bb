"""Levels 0, 1 and 2 of a batch of texts as contiguous tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megacontext.errors import InputError
from megacontext.gistnet import GistNet
from megacontext.runtime.gist_features import require_features


@dataclass(frozen=True, eq=False)
class HistoryBuffers:
    """Token embeddings of some texts and the gists a GistNet makes of them.

    Gradients flow from the gists to the GistNet.

    Attributes:
        embeddings: ``[batch, tokens, d_model]``, level 0.
        gists: ``[batch, blocks + spans, gist_width]``: level 1, then level 2 if it was asked for.
        fidelity: ``[batch, blocks + spans]``, predicted KL in nats per token.
        block_size: tokens of a block and gists of a level-2 gist.
        levels: highest level that is there: 1 or 2.
    """

    embeddings: Tensor
    gists: Tensor
    fidelity: Tensor
    block_size: int
    levels: int

    @classmethod
    def encode(
        cls,
        gistnet: GistNet,
        embeddings: Tensor,
        *,
        levels: int = 1,
        features: Tensor | None = None,
    ) -> HistoryBuffers:
        """Makes all gists of ``embeddings [batch, tokens, d_model]`` up to level 1 or 2.

        A block's encoder sees what precedes it in its text, up to its own ``context_tokens``.

        Args:
            gistnet: makes the gists.
            embeddings: input embeddings of the tokens.
            levels: 1 or 2.
            features: ``[batch, tokens, d_model]``, what the GistNet reads of the tokens if it does
                not read embeddings, from :class:`GistFeatures`. A text's first token counts as the
                start of a segment, wherever it stood in the history it was cut from.

        Raises:
            InputError: the tokens are no whole number of blocks, ``levels`` is not 1 or 2, or
                features are missing or have another shape.
        """
        size = gistnet.config.block_size
        if embeddings.shape[1] % size or levels not in (1, 2):
            raise InputError(
                f"{embeddings.shape[1]} tokens and {levels} levels: expected a multiple of {size} "
                "and 1 or 2"
            )
        read = require_features(gistnet, features, embeddings)
        blocks = read.unflatten(1, (-1, size))
        vectors, fidelity = gistnet.encode_streams(blocks, 1)
        gists, fidelities = [vectors], [fidelity]
        spans = vectors.shape[1] // size
        if levels == 2 and spans:
            children = vectors[:, : spans * size].unflatten(1, (spans, size))
            made = gistnet.encode_streams(children, 2)
            gists.append(made.vectors)
            fidelities.append(made.fidelity)
        return cls(embeddings, torch.cat(gists, 1), torch.cat(fidelities, 1), size, levels)

    @property
    def n_blocks(self) -> int:
        """Blocks of each text."""
        return self.embeddings.shape[1] // self.block_size

    def parents(self, level: int) -> Tensor:
        """Int64 ``[n]``: for every node of ``level`` (0 or 1) its parent's index one level up."""
        count = self.embeddings.shape[1] if level == 0 else self.n_blocks
        return torch.arange(count, device=self.embeddings.device) // self.block_size

    def offsets(self, level: int) -> Tensor:
        """Int64 ``[n]``: the first token of every whole node of ``level`` (0, 1 or 2)."""
        width = self.block_size**level
        return torch.arange(
            0, self.embeddings.shape[1] // width * width, width, device=self.embeddings.device
        )
