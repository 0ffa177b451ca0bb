"""What KV ``incremental`` costs beside ``exact``: in time, and in nats."""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megacontext.evaluation.long_history import remember
from megacontext.evaluation.long_questions import LongQuestion
from megacontext.evaluation.noise import NoiseTokens
from megacontext.gistnet import GistNet
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine, EngineConfig
from megacontext.runtime.reading import KVMode, Reading, new_reading

_NOTHING = torch.empty(0, dtype=torch.int64)
_MODES: tuple[KVMode, KVMode] = ("exact", "incremental")


@dataclass(frozen=True)
class Compared:
    """One stretch of text, or one answer, predicted in both modes behind the same window.

    Attributes:
        exact: nats per token.
        incremental: nats per token.
        exact_right: whether greedy decoding writes exactly these tokens.
        incremental_right: the same in the other mode.
    """

    exact: float
    incremental: float
    exact_right: bool
    incremental_right: bool

    @property
    def delta(self) -> float:
        """Nats per token that ``incremental`` loses."""
        return self.incremental - self.exact


@dataclass(frozen=True)
class RefocusTime:
    """Milliseconds of one refocus, the reading in both modes right after each other.

    Attributes:
        look: its number among those for one query, from 0 on; only the first one reads the query.
            Of all looks for a query together it is their number.
        edits: how many there were.
        focus: of scores and edits, which are the same in both modes.
        read: by mode, of reading the edited window.
    """

    look: int
    edits: int
    focus: float
    read: dict[KVMode, float]

    def whole(self, mode: KVMode) -> float:
        """Focus and reading together."""
        return self.focus + self.read[mode]


@torch.inference_mode()
def compare_on_prose(
    base: BaseModel,
    gistnet: GistNet,
    config: EngineConfig,
    noise: NoiseTokens,
    *,
    history: int,
    blocks: int,
    seed: str,
) -> list[Compared]:
    """Reads on in prose as if it were being written: a refocus before every block, then its NLL.

    Both modes go through the same windows, and what ``incremental`` keeps grows older with every
    block. The first block, read anew in both modes, is left out.

    Args:
        base: the frozen base model.
        gistnet: makes and reads the gists.
        config: budget and habits; its ``kv`` does not matter.
        noise: the prose.
        history: tokens that were read before.
        blocks: how many blocks follow.
        seed: of the place in the prose.
    """
    size = gistnet.config.block_size
    tokens = noise.draw(random.Random(f"kv modes/{seed}"), history + blocks * size)
    compared: list[Compared] = []
    with _engine(base, gistnet, config, tokens[:history]) as engine:
        readings = _readings(engine)
        said = 0
        for block in tokens[history:].split(size):
            engine.focus.refocus(_NOTHING, asking=said, reserve=size)
            compared.append(_compare(engine, readings, _NOTHING, block, asking=said))
            engine.ingestor.append(block)
            engine.focus.advance(engine.memory.n_tokens)
            said += len(block)
    return compared[1:]


@torch.inference_mode()
def compare_on_answers(
    base: BaseModel, gistnet: GistNet, config: EngineConfig, questions: Iterator[LongQuestion]
) -> list[Compared]:
    """The NLL of answers whose evidence is fetched after the question was read.

    The question is read behind the coarsest window, the focus looks until it finds nothing more,
    and the answer is predicted behind what ``incremental`` and ``exact`` make of the edits.

    Args:
        base: the frozen base model.
        gistnet: makes and reads the gists.
        config: budget and habits; its ``kv`` does not matter.
        questions: those about one history follow each other.
    """
    compared: list[Compared] = []
    size = gistnet.config.block_size
    for _, asked in itertools.groupby(questions, key=lambda question: id(question.history)):
        first = next(asked)
        with _engine(base, gistnet, config, first.history) as engine:
            for question in itertools.chain([first], asked):
                prompt, query = base.encode(question.prompt), base.encode(question.question)
                mark = engine.focus.mark()
                engine.focus.start_over()
                readings = _readings(engine)
                for reading in readings.values():
                    reading.read(engine.context, prompt, asking=len(prompt))
                for _ in range(config.refocus_rounds):
                    plan = engine.focus.refocus(prompt, query=query, reserve=len(prompt) + size)
                    if not plan.more:
                        break
                target = base.encode(f" {question.answers[0]}\n")
                compared.append(_compare(engine, readings, prompt, target, asking=len(prompt)))
                engine.focus.return_to(mark)  # or cooldowns of one question would bind the next
    return compared


@torch.inference_mode()
def refocus_times(engine: Engine, queries: list[str]) -> list[RefocusTime]:
    """Refocuses for every query until nothing changes, as before an answer.

    Each begins with the window that the one before left.

    Args:
        engine: its policy, allocator, halo and most looks; ``kv`` does not matter.
        queries: what the focus is asked for; the first warms up and does not count.
    """
    readings, times = _begun_readings(engine), list[RefocusTime]()
    for number, query in enumerate(queries):
        for look in range(engine.config.refocus_rounds):
            started = time.perf_counter()
            plan = engine.refocus(query, reserve=engine.memory.identity.block_size)
            focus = (time.perf_counter() - started) * 1000
            read = _read_by_turns(engine, readings, number + look)
            if number:
                times.append(RefocusTime(look, len(plan.edits), focus, read))
            if not plan.edits and not plan.unread:
                break
    return times


@torch.inference_mode()
def question_times(engine: Engine, queries: list[str]) -> list[RefocusTime]:
    """All looks for a query and one reading of the window they leave, as before an answer.

    Arguments as :func:`refocus_times`, whose windows they go on from.
    """
    readings, times = _begun_readings(engine), list[RefocusTime]()
    for number, query in enumerate(queries):
        started, looks, edits = time.perf_counter(), 0, 0
        for _ in range(engine.config.refocus_rounds):
            plan = engine.refocus(query, reserve=engine.memory.identity.block_size)
            looks, edits = looks + 1, edits + len(plan.edits)
            if not plan.more:
                break
        focus = (time.perf_counter() - started) * 1000
        read = _read_by_turns(engine, readings, number)
        if number:
            times.append(RefocusTime(looks, edits, focus, read))
    return times


def _begun_readings(engine: Engine) -> dict[KVMode, Reading]:
    """Both modes, with the window of now read."""
    readings = _readings(engine)
    for reading in readings.values():
        reading.read(engine.context, _NOTHING)
    return readings


def _read_by_turns(
    engine: Engine, readings: dict[KVMode, Reading], number: int
) -> dict[KVMode, float]:
    """Milliseconds by mode; by turns, so that neither always finds the processor's caches warm."""
    size, read = engine.memory.identity.block_size, dict[KVMode, float]()
    for mode in _MODES if number % 2 else _MODES[::-1]:
        started = time.perf_counter()
        readings[mode].read(engine.context, _NOTHING, asking=size)
        read[mode] = (time.perf_counter() - started) * 1000
    return read


@contextmanager
def _engine(
    base: BaseModel, gistnet: GistNet, config: EngineConfig, history: Tensor
) -> Generator[Engine]:
    with (
        tempfile.TemporaryDirectory() as folder,
        remember(base, gistnet, None, history, Path(folder) / "kv.mctx") as memory,
    ):
        yield Engine(base, memory, gistnet=gistnet, config=config)


def _readings(engine: Engine) -> dict[KVMode, Reading]:
    config = engine.config
    return {
        mode: new_reading(
            mode,
            engine.base,
            engine.reader,
            halo=config.kv_halo,
            query_tokens=config.query_tokens,
        )
        for mode in _MODES
    }


def _compare(
    engine: Engine, readings: dict[KVMode, Reading], pending: Tensor, target: Tensor, *, asking: int
) -> Compared:
    nll: dict[KVMode, float] = {}
    right: dict[KVMode, bool] = {}
    for mode, reading in readings.items():
        logits = reading.read(engine.context, pending, asking=asking)[None]
        if len(target) > 1:
            at = reading.cache.positions[-1] + torch.arange(1, len(target), device=logits.device)
            logits = torch.cat((logits, engine.base.step(target[:-1], at, reading.cache)))
        expected = target.to(logits.device)
        likelihood = logits.float().log_softmax(dim=-1).gather(1, expected[:, None])
        nll[mode] = -float(likelihood.mean())
        right[mode] = bool((logits.argmax(dim=-1) == expected).all())
    return Compared(nll["exact"], nll["incremental"], right["exact"], right["incremental"])
