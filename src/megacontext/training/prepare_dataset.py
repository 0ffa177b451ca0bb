"""Prepares training slices from a corpus: cuts it, runs the teacher, writes; can be interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.runtime.base_model import BaseModel
from megacontext.training.slice_manifest import Manifest, Recipe, SourceFile, TeacherRecipe
from megacontext.training.slice_store import SliceWriter
from megacontext.training.slices import SliceConfig, cut_corpus
from megacontext.training.teacher_states import Teacher, TeacherConfig, weights_fingerprint
from megacontext.training.texts import TextFile, find_texts


class PrepareDatasetConfig(FrozenConfig):
    """One data set.

    Attributes:
        output: its folder.
        model: the frozen base: its tokenizer cuts the text, it is the teacher.
        model_dtype: dtype it runs in.
        device: where it runs.
        corpus: text files, plain or ``.zst``, documents parted by ``<|endoftext|>``; patterns
            (``docs/*.md``) and ``bundled:NAME`` are understood.
        slices: how documents are cut.
        teacher: which hidden states are kept.
        shard_slices: slices per shard.
        max_slices: end after so many; ``None``: take the whole corpus.
    """

    output: Path
    model: str = "bundled:tiny"
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    device: str = "cpu"
    corpus: tuple[str, ...] = Field(min_length=1)
    slices: SliceConfig = SliceConfig()
    teacher: TeacherConfig = TeacherConfig()
    shard_slices: int = Field(default=32, ge=1, le=65_536)
    max_slices: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Progress:
    """How far the preparation is.

    Attributes:
        bytes_read: of the corpus.
        bytes_total: size of the corpus.
        slices: written so far, those of earlier runs included.
        shards: finished so far.
    """

    bytes_read: int
    bytes_total: int
    slices: int
    shards: int


def prepare_dataset(
    config: PrepareDatasetConfig,
    *,
    base: BaseModel | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Prepares a data set, or the rest of one that an earlier call began.

    The same corpus, model and configuration give the same bytes on the same machine, however often
    the work was interrupted. Memory does not grow with the corpus.

    Args:
        config: the data set.
        base: the model, where it is loaded already.
        on_progress: called after every slice.

    Returns:
        The manifest of the finished data set.

    Raises:
        DataError: the corpus cannot be read or gives no slice, or the output cannot be used.
        ConfigError: the teacher cannot be run as configured.
        ModelError: the model cannot be loaded.
    """
    texts = find_texts(config.corpus)
    if base is None:
        base = BaseModel.from_pretrained(
            config.model, dtype=config.model_dtype, device=config.device
        )
    teacher = _teacher(config, base)
    sources = tuple(
        SourceFile(name=text.name, bytes=text.path.stat().st_size, sha256=text.digest())
        for text in texts
    )
    writer = SliceWriter(config.output, _recipe(config, base, teacher, sources))
    if writer.manifest.complete:
        return writer.manifest
    try:
        return _write(config, base, teacher, texts, writer, on_progress)
    finally:
        writer.close()


def _write(
    config: PrepareDatasetConfig,
    base: BaseModel,
    teacher: Teacher | None,
    texts: list[TextFile],
    writer: SliceWriter,
    on_progress: Callable[[Progress], None] | None,
) -> Manifest:
    earlier = writer.manifest.shards
    skipped = earlier[-1].documents_skipped if earlier else 0
    total = sum(source.bytes for source in writer.manifest.recipe.sources)
    bytes_read = 0

    def on_read(count: int) -> None:
        nonlocal bytes_read
        bytes_read += count

    cuts = cut_corpus(texts, base.encode, config.slices, after=writer.last, on_read=on_read)
    for cut in cuts if writer.n_slices != config.max_slices else ():
        if cut.window is None:
            skipped += 1
            continue
        states = None
        if teacher is not None:
            future = cut.window.future[: None if config.teacher.horizon else 0]
            states = teacher.states(torch.cat([cut.window.context, future]))
        writer.add(cut.place, cut.window, states, skipped)
        if on_progress is not None:
            shards = len(writer.manifest.shards)
            on_progress(Progress(bytes_read, total, writer.n_slices, shards))
        if writer.n_slices == config.max_slices:
            break
    return writer.finish(skipped)


def _teacher(config: PrepareDatasetConfig, base: BaseModel) -> Teacher | None:
    if not config.teacher.enabled:
        return None
    longest = config.slices.context_tokens
    longest += config.slices.horizon if config.teacher.horizon else 0
    return Teacher(base, config.teacher, longest)


def _recipe(
    config: PrepareDatasetConfig,
    base: BaseModel,
    teacher: Teacher | None,
    sources: tuple[SourceFile, ...],
) -> Recipe:
    stored = None
    if teacher is not None:
        stored = TeacherRecipe(
            weights=weights_fingerprint(base.model),
            model_dtype=str(base.dtype).removeprefix("torch."),
            layers=teacher.layers,
            d_model=base.d_model,
            horizon=config.teacher.horizon,
            dtype=config.teacher.dtype,
        )
    return Recipe(
        base_model=base.name,
        tokenizer_hash=base.tokenizer_hash,
        pad_token=_pad_token(base.tokenizer),
        slices=config.slices,
        teacher=stored,
        sources=sources,
        shard_slices=config.shard_slices,
        max_slices=config.max_slices,
    )


def _pad_token(tokenizer: Any) -> int:
    """Any token will do, since the mask tells; the tokenizer's own looks least odd."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
