"""Focus without gists: what the focus brought into detail, and nothing in place of the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from megacontext.evaluation.baselines.engine_rival import EngineRival, WatchedReader
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.context_reader import ContextReader
from megacontext.runtime.engine import Engine
from megacontext.runtime.working_context import WorkingContext


class RawReader(WatchedReader):
    """Reads the raw blocks of a working context, at packed positions, and leaves gists out."""

    def read(self, context: WorkingContext, pending: Tensor, *, ahead: int = 0) -> ContextInput:
        """The raw blocks followed by ``pending``; see :meth:`ContextReader.read`."""
        if self.first is None:
            self.first = context
        spans = context.spans()[context.levels == 0, 1:].tolist()
        parts = [self.memory.tokens(start, end).long() for start, end in spans]
        rows = self.base.embed(torch.cat((*parts, pending.long())))
        return ContextInput(rows, torch.arange(len(rows), device=rows.device))


class FocusOnly(EngineRival):
    """An engine whose base model never sees a gist; the focus is decided as ever.

    Args:
        engine: with any policy.
        look_again: see :meth:`Engine.generate`.
    """

    def __init__(self, engine: Engine, *, look_again: str = "") -> None:
        super().__init__("focus_only", engine, look_again=look_again)

    def make_reader(self, reader: ContextReader) -> WatchedReader:
        """One that leaves gists out."""
        return RawReader(reader)
