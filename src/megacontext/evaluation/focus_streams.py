"""The focus over held-out prose that streams by, and what a refocus costs beside a decode step."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megacontext.evaluation.focus_asking import WatchedPolicy
from megacontext.evaluation.focus_histories import FocusQuestion
from megacontext.evaluation.long_history import remember
from megacontext.evaluation.noise import NoiseTokens
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine, EngineConfig
from megacontext.runtime.focus_policies import FocusPolicy, RecencyPolicy
from megacontext.runtime.oracle_policy import OraclePolicy
from megacontext.runtime.plain_decode import raw_context
from megacontext.telemetry import Telemetry

# What the oracle tries out beside the raw blocks it may keep: what BM25 finds, with neighbours.
_PROPOSALS = 2


@dataclass(frozen=True)
class Models:
    """What every engine of a run shares.

    Attributes:
        base: the frozen base model.
        gistnet: makes the gists.
        lens: makes the keys stored beside them; none are if none.
        config: budget and habits.
    """

    base: BaseModel
    gistnet: GistNet
    lens: LensNet | None
    config: EngineConfig

    def memory(self, tokens: Tensor, path: Path) -> Memory:
        """A new memory of a history ``[n]``, open for writing."""
        return remember(self.base, self.gistnet, self.lens, tokens, path)

    def engine(self, memory: Memory, telemetry: Telemetry | None = None) -> Engine:
        """An engine over a memory that was made for these models; it needs a policy yet."""
        return Engine(
            self.base,
            memory,
            gistnet=self.gistnet,
            policy=RecencyPolicy(),
            lens=self.lens,
            config=self.config,
            telemetry=telemetry,
        )


@dataclass(frozen=True)
class Streamed:
    """What prose that streamed by cost, block by block.

    Attributes:
        nll: nats per token of each block before it was read.
        swap_rates: edits per entry, mean over the refocuses before each block.
        chosen_rates: the same without the edits that make room for new tokens, which no policy can
            do without.
    """

    nll: list[float]
    swap_rates: list[float]
    chosen_rates: list[float]

    @classmethod
    def nothing(cls) -> Self:
        """Before the first block."""
        return cls([], [], [])

    def extend(self, more: Streamed) -> None:
        """Appends what came later."""
        self.nll.extend(more.nll)
        self.swap_rates.extend(more.swap_rates)
        self.chosen_rates.extend(more.chosen_rates)


def stream_prose(
    models: Models,
    policy: FocusPolicy | None,
    noise: NoiseTokens,
    path: Path,
    *,
    history: int,
    blocks: int,
    seed: str,
) -> Streamed:
    """Reads on in prose behind a history of the same prose, refocusing before every block.

    Args:
        models: what to read with.
        policy: what to focus on; an oracle that knows each block beforehand if ``None``.
        noise: the prose.
        path: where the memory is made.
        history: tokens that were read before.
        blocks: how many blocks are predicted, and then read.
        seed: of the place in the prose.
    """
    size, window = models.gistnet.config.block_size, models.config.budget
    tokens = noise.draw(random.Random(seed), history + blocks * size)
    streamed = Streamed.nothing()
    with models.memory(tokens[: max(0, history - window)], path) as memory:
        engine = models.engine(memory)
        # What fits the window is read as it streams by, so that the newest tokens are raw.
        _read_on(engine, tokens[memory.n_tokens : history])
        for block in tokens[history:].split(size):
            streamed.extend(_predict(engine, block, policy))
            _read_on(engine, block)
    return streamed


def _read_on(engine: Engine, tokens: Tensor) -> None:
    if len(tokens):
        engine.ingestor.append(tokens)
    engine.focus.advance(engine.memory.n_tokens)


def _predict(engine: Engine, block: Tensor, policy: FocusPolicy | None) -> Streamed:
    """Refocuses until nothing is expanded any more, and predicts the block to come."""
    watched = WatchedPolicy(OraclePolicy(block, (), _PROPOSALS) if policy is None else policy)
    focus, nothing = engine.focus, torch.empty(0, dtype=torch.int64)
    focus.policy = watched
    rates: list[float] = []
    chosen: list[float] = []
    for _ in range(engine.config.refocus_rounds):
        plan = focus.refocus(nothing, reserve=len(block), reason="request")
        entries = max(1, watched.entries[-1])
        rates.append(len(plan.edits) / entries)
        chosen.append(sum(edit.reason != "room" for edit in plan.edits) / entries)
        if not plan.more:
            break
    reading = engine.reader.read(focus.context, nothing, ahead=len(block))
    nll = float(engine.base.nll(reading, block).mean())
    return Streamed([nll], [sum(rates) / len(rates)], [sum(chosen) / len(chosen)])


@torch.inference_mode()
def refocus_cost(
    engine: Engine, policy: FocusPolicy, questions: Sequence[FocusQuestion]
) -> tuple[list[float], list[float]]:
    """What one refocus costs beside one decode step of the base over a window of raw tokens.

    Args:
        engine: over the memory that the questions are about.
        policy: scores; of its refocus, scores and edits count.
        questions: one sample each; the first of them warms up and does not count.

    Returns:
        Milliseconds of every refocus, and of the decode step right after it.
    """
    base, focus, memory = engine.base, engine.focus, engine.memory
    focus.policy = policy
    # The steps of all samples fill the window up to its last token.
    first = max(0, memory.n_tokens - engine.config.budget + len(questions))
    newest = memory.tokens(first, memory.n_tokens).long()
    read = base.prefill(raw_context(base, newest), keep=1)
    refocuses: list[float] = []
    steps: list[float] = []
    for question in questions:
        prompt, query = base.encode(question.prompt), base.encode(question.asked.text)
        position = read.cache.positions[-1:] + 1
        focus.start_over()
        started = time.perf_counter()
        focus.refocus(prompt, query=query, reserve=len(prompt), reason="request")
        refocused = time.perf_counter()
        base.step(prompt[-1:], position, read.cache)
        stepped = time.perf_counter()
        refocuses.append((refocused - started) * 1000)
        steps.append((stepped - refocused) * 1000)
    return refocuses[1:], steps[1:]
