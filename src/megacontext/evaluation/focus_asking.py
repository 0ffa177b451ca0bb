"""Asks one engine and watches its focus: what was raw, how much was swapped, how long it took."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from megacontext.errors import InvariantError
from megacontext.evaluation.baselines.engine_rival import WatchedReader
from megacontext.evaluation.focus_histories import FocusQuestion
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine
from megacontext.runtime.focus_policies import FocusPolicy, FocusView
from megacontext.runtime.focus_scores import FocusScores
from megacontext.runtime.oracle_policy import OraclePolicy
from megacontext.runtime.working_context import WorkingContext
from megacontext.tasks.documents import final_answer
from megacontext.telemetry.events import Event, RefocusEvent

_STOP = "\n"
_LOOK_AGAIN = "."
_PARTS = re.compile(r"[^.]*\.|[^.]+$", re.DOTALL)
# Ways to say that nothing is known; the first is the one that the bundled model was taught.
_ABSTAINS = re.compile(
    r"(unknown|not (known|mentioned|stated|given)|no (answer|information)|nobody knows"
    r"|i (do not|don't|cannot|can't))\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answered:
    """What became of one question.

    Attributes:
        answer: what was written, notes included.
        right: whether the final answer is exactly the expected one.
        abstained: whether it says that nothing is known, or nothing at all.
        raw_at_start: share of the needed blocks that were raw when the first token was written.
        raw_at_end: the same after the last look.
        swap_rate: edits per entry, mean over the refocuses.
        refocus_ms: of scores and edits, mean over the refocuses.
    """

    answer: str
    right: bool
    abstained: bool
    raw_at_start: float = 0.0
    raw_at_end: float = 0.0
    swap_rate: float = 0.0
    refocus_ms: float = 0.0

    @classmethod
    def of(cls, written: str, expected: str, **measured: float) -> Self:
        """Marks what was written."""
        answer = final_answer(written)
        abstained = not answer or _ABSTAINS.match(answer) is not None
        return cls(written.strip(), answer == expected, abstained, **measured)

    def as_json(self) -> dict[str, Any]:
        """The values by name."""
        return asdict(self)


class WatchedPolicy:
    """Scores like another policy and notes how many entries the context had.

    Args:
        policy: the one to score like.
    """

    def __init__(self, policy: FocusPolicy) -> None:
        self.policy = policy
        self.entries: list[int] = []

    @property
    def name(self) -> str:
        """Name of the policy watched."""
        return self.policy.name

    def score(self, view: FocusView) -> FocusScores:
        """See :meth:`FocusPolicy.score`."""
        self.entries.append(len(view.context))
        return self.policy.score(view)


class TellingOracle:
    """An oracle that is told what shall be written, and at every look only what is left of it.

    Args:
        question: with its answer, notes and evidence.
        base: its tokenizer cuts what shall be written.
        n_prompt: tokens of the prompt; what is pending behind them was written.
        block_size: tokens of a block.
        proposals: most blocks that BM25 adds to those of the evidence.
    """

    name = "oracle"

    def __init__(
        self,
        question: FocusQuestion,
        base: BaseModel,
        n_prompt: int,
        block_size: int,
        proposals: int = 1,
    ) -> None:
        self.base = base
        self.n_prompt = n_prompt
        self.hints = question.blocks(block_size)
        self.proposals = proposals
        self._parts: list[str] = _PARTS.findall(f" {question.asked.written}{_STOP}")

    def score(self, view: FocusView) -> FocusScores:
        """Measured utilities for the sentences that are still to be written."""
        written = self.base.decode(view.pending[self.n_prompt :])
        # Told by count: a model that went another way still has to come to the end.
        done = min(written.count(_LOOK_AGAIN), len(self._parts) - 1)
        future = self.base.encode("".join(self._parts[done:]))
        return OraclePolicy(future, self.hints, self.proposals).score(view)


class RefocusTimes:
    """A sink that keeps how long every refocus took."""

    def __init__(self) -> None:
        self.ms: list[float] = []

    def write(self, event: Event) -> None:
        """Keeps the time of a refocus."""
        if isinstance(event, RefocusEvent):
            self.ms.append(event.ms)

    def close(self) -> None:
        """Does nothing."""


class Asker:
    """Asks one engine.

    Args:
        engine: its own from now on; made with ``Telemetry(times)``.
        times: told of every refocus of the engine.
        max_new_tokens: most tokens of an answer, notes included.
    """

    def __init__(self, engine: Engine, times: RefocusTimes, max_new_tokens: int) -> None:
        self.engine = engine
        self.times = times
        self.max_new_tokens = max_new_tokens
        self.reader = WatchedReader(engine.reader)
        # Policies go on with the engine's own reader: what they read is not what the base reads.
        engine.reader = self.reader

    def ask(self, question: FocusQuestion, policy: FocusPolicy) -> Answered:
        """The answer under a policy; nothing is remembered."""
        engine = self.engine
        watched = WatchedPolicy(policy)
        engine.focus.policy = watched
        self.times.ms.clear()
        self.reader.watch()
        written = engine.ask(
            question.prompt,
            query=question.asked.text,
            max_new_tokens=self.max_new_tokens,
            stop=_STOP,
            look_again=_LOOK_AGAIN,
            remember=False,
        )
        records = list(engine.focus.records)[-len(watched.entries) :]
        rates = [
            len(record.edits) / max(1, entries)
            for record, entries in zip(records, watched.entries, strict=True)
        ]
        blocks = question.blocks(engine.memory.identity.block_size)
        return Answered.of(
            written,
            question.asked.answer,
            raw_at_start=_raw_share(self.reader.first, blocks),
            raw_at_end=_raw_share(self.reader.last, blocks),
            swap_rate=sum(rates) / len(rates),
            refocus_ms=sum(self.times.ms) / len(self.times.ms),
        )


def _raw_share(context: WorkingContext | None, blocks: Sequence[int]) -> float:
    """Share of blocks that are raw; 1 where none are needed."""
    if not blocks:
        return 1.0
    if context is None:
        raise InvariantError("an answer was written behind no working context")
    raw = {
        start // context.block_size for level, start, _ in context.spans().tolist() if level == 0
    }
    return sum(block in raw for block in blocks) / len(blocks)
