"""Contexts of any length at a fixed budget: raw where they fit, through a memory where they do not.

What evaluation harnesses ask of a model: how likely a continuation is, and what it writes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacontext.closing import Closing
from megacontext.errors import InputError
from megacontext.runtime.answer import DecodedToken
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.engine import Engine
from megacontext.runtime.focus_scores import AllocatorState
from megacontext.runtime.plain_decode import decode_plain, raw_context
from megacontext.runtime.sampling import TokenSampler
from megacontext.runtime.session import Session
from megacontext.runtime.working_context import WorkingContext

_NOTHING = torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, eq=False)
class Scored:
    """How well a model predicts a continuation.

    Attributes:
        log_probs: ``[h]`` float32 on the CPU, in nats: of every token, given all before it.
        greedy: whether every token is the likeliest one.
    """

    log_probs: Tensor
    greedy: bool


@dataclass(frozen=True, eq=False)
class _Held:
    """A memory of one context, kept for the next request about the same one."""

    history: Tensor
    engine: Engine
    start: tuple[WorkingContext, AllocatorState]
    resources: ExitStack

    @property
    def grown(self) -> bool:
        """Whether more than the context has gone into the memory."""
        return self.engine.memory.n_tokens > len(self.history)


class LongRequests(Closing):
    """Scores and continues token sequences, each by itself, with at most ``budget`` rows read.

    A sequence that fits into the budget is read raw, exactly as the plain model reads it. Of a
    longer one, everything goes into a memory of its own, in a temporary folder; the newest tokens
    stay raw, and the focus finds what else is worth its cost. The context's newest ``query_tokens``
    tokens ask, and whatever follows them. Every ``stride`` tokens what was scored joins the memory
    and the focus moves on, as it does while an answer is written.

    Args:
        session: models, policy and sizes.
        stride: tokens scored between two moves of the focus.

    Attributes:
        beyond_window: requests so far that did not fit into the budget.

    Raises:
        InputError: ``stride`` is not positive.
        ConfigError, CheckpointError: the session's models and sizes do not fit together.
    """

    def __init__(self, session: Session, *, stride: int = 32) -> None:
        if stride < 1:
            raise InputError(f"stride is {stride}; score at least one token at a time")
        self.session = session
        self.base = session.base
        self.budget = session.config.engine.budget
        self.stride = stride
        self.beyond_window = 0
        self._held: _Held | None = None
        with self._engine():
            pass  # refuses a budget or a checkpoint that does not fit, before the first request

    def score(self, context: Tensor, targets: Tensor, *, rolling: bool = False) -> Scored:
        """How likely ``targets`` are behind ``context``.

        Args:
            context: ``[n]`` int64, at least one token.
            targets: ``[h]`` int64.
            rolling: the targets are one long text, not an answer to the context: of them too, only
                the newest ``query_tokens`` tokens ask.

        Raises:
            InputError: the context is empty, or a token lies outside the vocabulary.
            ConfigError: the budget is too small for the context's coarsest tiling.
        """
        if not len(context):
            raise InputError("there is no token to predict from; begin the context with one")
        if not len(targets):
            return Scored(torch.empty(0), greedy=True)
        ids = torch.cat((context, targets))
        done = min(len(ids), max(len(context), self.budget))
        parts: list[Scored] = []
        if done > len(context):
            read = raw_context(self.base, ids[: done - 1])
            parts.append(self._likelihood(read, ids[len(context) : done]))
        if done < len(ids):
            self.beyond_window += 1
            question = None if rolling else self.base.encode(self._question(context))
            parts.extend(self._beyond(ids, done, len(context), question))
        log_probs = torch.cat([part.log_probs for part in parts])
        return Scored(log_probs, greedy=all(part.greedy for part in parts))

    def write(
        self,
        context: Tensor,
        *,
        max_new_tokens: int,
        look_again: str = "",
        seed: int = 0,
        **sampling: Any,
    ) -> Generator[DecodedToken, None, None]:
        """Continues a context until the model ends it.

        Args:
            context: ``[n]`` int64, at least one token.
            max_new_tokens: most tokens to write.
            look_again: text behind which the focus looks again; none if empty.
            seed: of the sampler.
            sampling: overrides of the model's generation settings. A repetition penalty counts the
                context as said before only where all of it fits.

        Yields:
            Token by token. Close the generator to stop early.

        Raises:
            InputError: the context is empty, or ``max_new_tokens`` is not positive.
            ConfigError: a sampling setting is unknown, or the budget is too small.
        """
        if not len(context):
            raise InputError("there is nothing to continue; begin the context with a token")
        sampler = TokenSampler(self.base.generation_config, seed, **sampling)
        if len(context) + max_new_tokens <= self.budget:
            read = self.base.prefill(raw_context(self.base, context), keep=1)
            yield from decode_plain(
                self.base, read, context, sampler, max_new_tokens=max_new_tokens
            )
            return
        self.beyond_window += 1
        with self._engine() as engine:
            _append(engine, context)
            yield from engine.generate(
                max_new_tokens=max_new_tokens,
                query=self._question(context),
                look_again=look_again,
                seed=seed,
                **sampling,
            )

    def close(self) -> None:
        """Removes what is kept of the last request."""
        if self._held is not None:
            held, self._held = self._held, None
            held.resources.close()

    def _question(self, context: Tensor) -> str:
        return self.base.decode(context[-self.session.config.engine.query_tokens :])

    def _beyond(
        self, ids: Tensor, done: int, n_context: int, question: Tensor | None
    ) -> Iterator[Scored]:
        """Scores ``ids`` from ``done`` on out of working contexts."""
        engine = self._engine_behind(ids[:done])
        rounds = self.session.config.engine.refocus_rounds
        while True:
            asked = None if question is None else torch.cat((question, ids[n_context:done]))
            self._refocus(engine, asked, rounds)
            targets = ids[done : done + self.stride]
            yield self._likelihood(engine.reader.read(engine.context, targets[:-1]), targets)
            done += len(targets)
            if done == len(ids):
                return
            _append(engine, targets)
            rounds = 1

    def _refocus(self, engine: Engine, asked: Tensor | None, rounds: int) -> None:
        """Moves the focus, most ``rounds`` times, until it finds nothing more."""
        # The whole stride, so that continuations of all lengths see the same context.
        reserve = max(0, self.stride - engine.config.allocator.headroom)
        for _ in range(rounds):
            plan = engine.focus.refocus(_NOTHING, query=asked, reserve=reserve)
            if not plan.more:
                return

    def _likelihood(self, read: ContextInput, targets: Tensor) -> Scored:
        """Scores the tokens of which the last one follows the context read, the first ``h`` - 1
        rows earlier.
        """
        logits = self.base.prefill(read, keep=len(targets)).logits.float()
        targets = targets.to(logits.device)
        log_probs = logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0]
        return Scored(log_probs.cpu(), greedy=bool((logits.argmax(dim=-1) == targets).all()))

    def _engine_behind(self, history: Tensor) -> Engine:
        """An engine whose memory holds a history; that of the last call if it still does."""
        held = self._held
        if held is not None and torch.equal(held.history, history) and not held.grown:
            held.engine.focus.return_to(held.start)
            return held.engine
        self.close()
        with ExitStack() as resources:
            engine = resources.enter_context(self._engine())
            _append(engine, history)
            start = engine.focus.mark()
            self._held = _Held(history, engine, start, resources.pop_all())
        return engine

    @contextmanager
    def _engine(self) -> Generator[Engine, None, None]:
        """An engine over an empty memory, which is removed afterwards."""
        with tempfile.TemporaryDirectory(prefix="megacontext-request-") as folder:
            engine = self.session.create(Path(folder) / "context.mctx")
            with engine.memory:
                yield engine


def _append(engine: Engine, tokens: Tensor) -> None:
    engine.ingestor.append(tokens)
    engine.focus.advance(engine.memory.n_tokens)
