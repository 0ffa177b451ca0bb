"""Focus without gists: what the focus brought into detail, and nothing in place of the rest."""

from __future__ import annotations

from dataclasses import replace

import torch

from megacontext.evaluation.baselines.engine_rival import EngineRival, WatchedReader
from megacontext.runtime.context_reader import ContextReader
from megacontext.runtime.engine import Engine
from megacontext.runtime.row_layout import RowLayout
from megacontext.runtime.working_context import WorkingContext


class RawReader(WatchedReader):
    """Reads the raw blocks of a working context, at packed positions, and leaves gists out."""

    def layout(self, context: WorkingContext, n_pending: int, *, ahead: int = 0) -> RowLayout:
        """The raw rows of :meth:`ContextReader.layout`, as if there were no others."""
        rows = super().layout(context, n_pending, ahead=ahead)
        raw = rows[rows.levels == 0]
        return replace(raw, positions=torch.arange(len(raw)))


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
