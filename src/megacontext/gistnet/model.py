"""GistNet: makes one gist of ``block_size`` children, and reads gists for the base model."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megacontext.checkpoints import PretrainedModule, seeded_init
from megacontext.config import FrozenConfig
from megacontext.errors import InputError
from megacontext.gistnet.config import GistNetConfig
from megacontext.gistnet.encoder import BlockEncoder
from megacontext.gistnet.gists import Gists, pool_mean
from megacontext.gistnet.readers import EmbeddingReader, KVReader

CHUNK_BLOCKS = 64
# Matrix products of few rows round differently from those of many. With so many blocks per pass at
# least, a gist does not depend on how many others were made with it, so ingesting a text in pieces
# gives the gists of the whole text, bit by bit.
_LEAST_BLOCKS = 8


class GistNet(PretrainedModule[GistNetConfig]):
    """Compressor of the gist tree; all levels share the weights.

    Kind ``mean``: a gist is the mean of its children and nothing is learned.

    Kind ``transformer``: the children, told apart by a level embedding, pass a small transformer
    together with a window of tokens that precede them; the pooled result is mapped to a
    change of the children's mean. That last map starts at zero, so an untrained transformer with
    ``gist_width == d_model`` *is* the mean pool, bit for bit. A wider gist starts as the mean,
    repeated. Learned gists follow Gist Tokens (arXiv 2304.08467), the context before the block
    REFRAG and AutoCompressors (arXiv 2509.01092, 2305.14788).

    What is called a token's embedding here is, with ``feature_layers`` in the configuration, its
    hidden state after so many layers of the base model.
    """

    model_type: ClassVar[str] = "megacontext-gistnet"
    config_type: ClassVar[type[FrozenConfig]] = GistNetConfig

    def __init__(self, config: GistNetConfig) -> None:
        super().__init__(config)
        self.reader: EmbeddingReader | KVReader
        self.encoder: BlockEncoder | None = None
        with seeded_init(config.init_seed):
            if config.kind == "transformer":
                self.encoder = BlockEncoder(config)
            make_reader = KVReader if config.reader == "kv" else EmbeddingReader
            self.reader = make_reader(config)

    @classmethod
    def untrained(cls, d_model: int, *, block_size: int = 32) -> Self:
        """A GistNet without parameters: a gist is the mean of its children, read as it is."""
        return cls(GistNetConfig(kind="mean", d_model=d_model, block_size=block_size)).eval()

    @property
    def cost(self) -> int:
        """Entries, and so token-equivalents of the budget, that one gist is read as."""
        return self.config.slots

    def encode(
        self,
        children: Tensor,
        level: int,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Gists:
        """Makes the gists of whole blocks that need not be neighbours.

        Args:
            children: ``[n, block_size, width]``: token embeddings (``d_model`` wide) for level 1,
                gists of the level below (``gist_width`` wide) above. Any floating type.
            level: level of the gists to make, from 1.
            context: ``[n, c, d_model]`` embeddings of the tokens just before each block, the
                nearest last; ``c`` is at most ``context_tokens``. Kind ``mean`` ignores it.
            context_mask: bool ``[n, c]``, False where a position of ``context`` is padding.

        Returns:
            The gists, in the type of the weights (kind ``mean``: at least float32).

        Raises:
            InputError: a shape, a type or the level does not fit; the message names the shapes.
        """
        self._check_children(children, level, dims=3)
        self._check_context(children, context, context_mask)
        if self.encoder is None:
            return self._mean_gists(children)
        children = children.to(self._dtype)
        hidden = self.encoder.embed(children, level)[:, None]
        valid = None
        if context is not None and context.shape[1]:
            before = self.encoder.embed(_masked(context.to(self._dtype), context_mask), 1)
            before, valid = _block_context(before, context_mask, self.config.block_size)
            hidden = torch.cat((before, hidden), dim=1)
        return self.encoder(hidden, valid, children)

    def encode_level(
        self,
        children: Tensor,
        level: int,
        context: Tensor | None = None,
        *,
        chunk_blocks: int = CHUNK_BLOCKS,
    ) -> Gists:
        """Makes the gists of neighbouring blocks, each seeing the tokens before it.

        Level 1 gives what :meth:`encode` gives with every block's preceding ``context_tokens`` as
        context, at a fraction of the cost, since neighbours share their states. Above level 1 the
        children carry their context already: there it is :meth:`encode` without context.

        Args:
            children: ``[m * block_size, width]``, consecutive, in order.
            level: level of the gists to make, from 1.
            context: ``[c, d_model]`` embeddings of the tokens before the first child, for level 1
                (``None`` where the memory starts here); only the last ``context_tokens`` count.
            chunk_blocks: blocks per pass, which bounds the memory needed.

        Returns:
            The ``m`` gists.

        Raises:
            InputError: a shape or the level does not fit.
        """
        self._check_children(children, level, dims=2)
        if chunk_blocks < 1:
            raise InputError(f"chunk_blocks is {chunk_blocks}, expected at least 1")
        size = self.config.block_size
        blocks = children.unflatten(0, (len(children) // size, size))
        if context is not None and (context.ndim != 2 or context.shape[1] != self.config.d_model):
            raise InputError(
                f"context has shape {tuple(context.shape)}, expected [c, {self.config.d_model}]"
            )
        if self.encoder is None or level > 1 or not len(blocks):
            parts = [
                _first(self.encode(self._filled(part), level), len(part))
                for part in blocks.split(chunk_blocks)
            ]
        else:
            parts = self._encode_stream(self.encoder, blocks, context, chunk_blocks)
        if len(parts) == 1:
            return parts[0]
        return Gists(
            torch.cat([part.vectors for part in parts]),
            torch.cat([part.fidelity for part in parts]),
        )

    def encode_streams(self, children: Tensor, level: int) -> Gists:
        """Makes all gists of several streams at once, as :meth:`encode_level` does of one.

        Args:
            children: ``[streams, blocks, block_size, width]``; every stream starts where its
                memory does.
            level: level of the gists to make, from 1.

        Returns:
            Vectors ``[streams, blocks, gist_width]`` and fidelity ``[streams, blocks]``.

        Raises:
            InputError: a shape or the level does not fit.
        """
        if children.ndim != 4:
            raise InputError(
                f"children have shape {tuple(children.shape)}, expected [streams, blocks, "
                f"{self.config.block_size}, width]"
            )
        flat = children.flatten(0, 1)
        self._check_children(flat, level, dims=3)
        if self.encoder is None or level > 1 or not len(flat):
            made = self.encode(flat, level)
        else:
            hidden = self.encoder.embed(children.to(self._dtype), level)
            made = self.encoder(hidden, None, flat.to(self._dtype))
        shape = children.shape[:2]
        return Gists(made.vectors.unflatten(0, shape), made.fidelity.unflatten(0, shape))

    def read_embeddings(self, gists: Tensor, levels: Tensor, slots: int | None = None) -> Tensor:
        """Reads gists as input embeddings of the base model.

        Args:
            gists: ``[n, gist_width]``, any floating type.
            levels: int64 ``[n]``, level of each gist, from 1.
            slots: read the first of a gist's entries only, so many; ``None`` reads all.

        Returns:
            ``[n, slots, d_model]``, in the type of the reader's weights (of ``gists`` where the
            reader has none).

        Raises:
            InputError: a shape or level does not fit, or the reader is ``kv``.
        """
        reader = self.reader
        if not isinstance(reader, EmbeddingReader):
            raise InputError("this GistNet's gists are read as keys and values: call read_kv")
        self._check_read(gists, levels, slots)
        dtype = _reader_dtype(reader, gists)
        return reader(gists.to(dtype), levels, slots or self.config.slots)

    def read_kv(
        self, gists: Tensor, levels: Tensor, slots: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reads gists as keys and values of every layer of the base model.

        Args:
            gists: ``[n, gist_width]``, any floating type.
            levels: int64 ``[n]``, level of each gist, from 1.
            slots: read the first of a gist's entries only, so many; ``None`` reads all.

        Returns:
            Keys ``[kv_layers, n, slots, kv_heads, kv_head_dim]``, not rotated, and values
            ``[kv_layers, n, slots, kv_heads, kv_value_dim]``.

        Raises:
            InputError: a shape or level does not fit, or the reader is ``embedding``.
        """
        reader = self.reader
        if not isinstance(reader, KVReader):
            raise InputError("this GistNet's gists are read as embeddings: call read_embeddings")
        self._check_read(gists, levels, slots)
        dtype = _reader_dtype(reader, gists)
        return reader(gists.to(dtype), levels, slots or self.config.slots)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def _mean_gists(self, children: Tensor) -> Gists:
        if children.dtype in (torch.float16, torch.bfloat16):
            children = children.float()
        vectors = pool_mean(children, rescale=self.config.rescale)
        return Gists(vectors, vectors.new_full(vectors.shape[:1], float("nan")))

    def _encode_stream(
        self, encoder: BlockEncoder, blocks: Tensor, context: Tensor | None, chunk_blocks: int
    ) -> list[Gists]:
        size, reach = self.config.block_size, self.config.context_tokens
        blocks = blocks.to(self._dtype)
        if context is None:
            context = blocks.new_empty(0, self.config.d_model)
        context = context[max(0, len(context) - reach) :].to(self._dtype)
        parts: list[Gists] = []
        for part in blocks.split(chunk_blocks):
            filled = self._filled(part)
            hidden = encoder.embed(filled, 1)[None]
            valid = None
            if len(context):
                before, valid = _block_context(encoder.embed(context, 1)[None], None, size)
                hidden = torch.cat((before, hidden), dim=1)
                if valid is not None:
                    valid = F.pad(valid, (0, 0, 0, len(filled) - 1), value=True)
            parts.append(_first(encoder(hidden, valid, filled), len(part)))
            context = torch.cat((context, part.flatten(0, 1)))
            context = context[max(0, len(context) - reach) :]
        return parts

    def _filled(self, blocks: Tensor) -> Tensor:
        """``blocks [n, ...]``, few ones followed by copies of the last, which the others ignore."""
        missing = _LEAST_BLOCKS - len(blocks)
        if self.encoder is None or missing <= 0 or not len(blocks):
            return blocks
        return torch.cat((blocks, blocks[-1:].expand(missing, *blocks.shape[1:])))

    def _check_children(self, children: Tensor, level: int, *, dims: int) -> None:
        config = self.config
        if level < 1 or (self.encoder is not None and level > config.max_levels):
            raise InputError(f"level is {level}, expected 1 to max_levels ({config.max_levels})")
        width = config.d_model if level == 1 else config.gist_width
        good = children.ndim == dims and children.shape[-1] == width
        if dims == 3:
            wanted = f"[n, {config.block_size}, {width}]"
            good = good and children.shape[1] == config.block_size
        else:
            wanted = f"[m * {config.block_size}, {width}]"
            good = good and children.shape[0] % config.block_size == 0
        if not good:
            raise InputError(
                f"children of level {level} have shape {tuple(children.shape)}, expected {wanted}"
            )
        if not children.is_floating_point():
            raise InputError(f"children have type {children.dtype}, expected embeddings, not ids")

    def _check_context(self, children: Tensor, context: Tensor | None, mask: Tensor | None) -> None:
        config = self.config
        if context is None:
            if mask is not None:
                raise InputError("context_mask is given without context; give both or none")
            return
        n, limit = len(children), config.context_tokens
        if context.ndim != 3 or len(context) != n or context.shape[2] != config.d_model:
            raise InputError(
                f"context has shape {tuple(context.shape)}, expected [{n}, c, {config.d_model}]"
            )
        if self.encoder is not None and context.shape[1] > limit:
            raise InputError(
                f"context has {context.shape[1]} tokens, more than context_tokens ({limit})"
            )
        if mask is not None and (mask.shape != context.shape[:2] or mask.dtype != torch.bool):
            raise InputError(
                f"context_mask is {mask.dtype} {tuple(mask.shape)}, expected bool "
                f"{tuple(context.shape[:2])}"
            )

    def _check_read(self, gists: Tensor, levels: Tensor, slots: int | None) -> None:
        config = self.config
        if slots is not None and not 1 <= slots <= config.slots:
            raise InputError(f"slots is {slots}, expected 1 to {config.slots}")
        if gists.ndim != 2 or gists.shape[1] != config.gist_width or not gists.is_floating_point():
            raise InputError(
                f"gists are {gists.dtype} {tuple(gists.shape)}, expected floating "
                f"[n, {config.gist_width}]"
            )
        if levels.shape != gists.shape[:1] or levels.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"levels are {levels.dtype} {tuple(levels.shape)}, expected int64 [{len(gists)}]"
            )
        uses_levels = next(self.reader.parameters(), None) is not None
        if uses_levels and len(levels):
            low, high = (int(bound) for bound in levels.aminmax())
            if low < 1 or high > config.max_levels:
                raise InputError(
                    f"levels run from {low} to {high}, expected 1 to max_levels "
                    f"({config.max_levels})"
                )


def _first(gists: Gists, count: int) -> Gists:
    return Gists(gists.vectors[:count], gists.fidelity[:count])


def _masked(context: Tensor, mask: Tensor | None) -> Tensor:
    # Padding may hold anything, NaN included, and 0 * NaN is NaN.
    return context if mask is None else context.masked_fill(~mask[..., None], 0.0)


def _block_context(context: Tensor, mask: Tensor | None, size: int) -> tuple[Tensor, Tensor | None]:
    """Cuts ``[n, c, width]`` into blocks that end where the encoded block begins.

    Returns:
        ``[n, blocks, size, width]`` and the validity of context plus one encoded block, bool
        ``[n, blocks + 1, size]``, or ``None`` where all is valid.
    """
    n, c, _ = context.shape
    pad = -c % size
    blocks = F.pad(context, (0, 0, pad, 0)).unflatten(1, (-1, size))
    if mask is None and not pad:
        return blocks, None
    if mask is None:
        mask = torch.ones(n, c, dtype=torch.bool, device=context.device)
    valid = F.pad(F.pad(mask, (pad, 0)), (0, size), value=True)
    return blocks, valid.unflatten(1, (-1, size))


def _reader_dtype(reader: nn.Module, gists: Tensor) -> torch.dtype:
    first = next(reader.parameters(), None)
    return gists.dtype if first is None else first.dtype
