"""MegaContext itself, behind the interface of its rivals."""

from __future__ import annotations

import torch
from torch import Tensor

from megacontext.evaluation.baselines.rival import Span, joined
from megacontext.runtime.context_reader import ContextReader
from megacontext.runtime.engine import Engine
from megacontext.runtime.row_layout import RowLayout
from megacontext.runtime.working_context import WorkingContext


class WatchedReader(ContextReader):
    """Reads like another reader; remembers first and last context since it was told to watch.

    Args:
        reader: the one to read like.
    """

    def __init__(self, reader: ContextReader) -> None:
        super().__init__(
            reader.base,
            reader.gistnet,
            reader.memory,
            positions=reader.positions,
            max_positions=reader.max_positions,
        )
        self.first: WorkingContext | None = None
        self.last: WorkingContext | None = None

    def watch(self) -> None:
        """The next context is the first."""
        self.first = self.last = None

    def layout(self, context: WorkingContext, n_pending: int, *, ahead: int = 0) -> RowLayout:
        """See :meth:`ContextReader.layout`, which every reading begins with."""
        if self.first is None:
            self.first = context
        self.last = context
        return super().layout(context, n_pending, ahead=ahead)


class EngineRival:
    """An engine with its focus policy.

    An answer is not remembered. While it is written the focus goes on moving, so the budget holds
    at every moment, and the engine keeps one block of it free rather than the whole answer's room.

    Args:
        name: in tables.
        engine: over the memory; its own from now on.
        look_again: see :meth:`Engine.generate`.
    """

    def __init__(self, name: str, engine: Engine, *, look_again: str = "") -> None:
        self.name = name
        self.engine = engine
        self.look_again = look_again
        self.reader = self.make_reader(engine.reader)
        engine.reader = self.reader
        self._following = False

    def make_reader(self, reader: ContextReader) -> WatchedReader:
        """How the base reads working contexts; policies go on with the engine's own reader."""
        return WatchedReader(reader)

    @property
    def raw_spans(self) -> list[Span]:
        """Raw blocks of the working context in which the last answer, or NLL, began."""
        context = self.reader.first
        if context is None:
            return []
        return joined((start, end) for level, start, end in context.spans().tolist() if level == 0)

    def answer(self, prompt: str, question: str, *, max_new_tokens: int, stop: str = "\n") -> str:
        """The answer to a prompt after the whole history, focused for the bare question."""
        self.reader.watch()
        return self.engine.ask(
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            query=question,
            look_again=self.look_again,
        )

    def nll(self, cursor: int, targets: Tensor) -> Tensor:
        """NLL in nats, ``[h]`` float32, of the tokens that follow ``cursor``; the newest ask.

        Cursors that ascend by less than the budget are followed as a stream is: what is in detail
        stays so until something else is worth more. Otherwise the window starts with the newest
        tokens raw and all older ones as coarse as possible.
        """
        base, focus = self.engine.base, self.engine.focus
        self.follow(cursor)
        nothing = torch.empty(0, dtype=torch.int64)
        for _ in range(self.engine.config.refocus_rounds):
            plan = focus.refocus(nothing, reserve=len(targets), reason="request")
            if not plan.more:
                break
        self.reader.watch()
        reading = self.reader.read(focus.context, nothing, ahead=len(targets))
        return base.nll(reading, targets)

    def follow(self, cursor: int) -> None:
        """Moves the focus to ``cursor``, over new tokens or with a new window."""
        focus = self.engine.focus
        now = focus.context
        if not self._following or not 0 <= cursor - now.cursor <= now.budget:
            focus.context = WorkingContext.initial(
                max(0, cursor - now.budget),
                block_size=now.block_size,
                gist_cost=now.gist_cost,
                budget=now.budget,
                tail_tokens=now.tail_tokens,
            )
            self._following = True
        focus.advance(cursor)
