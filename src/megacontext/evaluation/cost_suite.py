"""Suite ``cost``: what a memory costs beside the base alone, and how flat that is in its length."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

from megacontext.evaluation.cost_config import CostSuiteConfig
from megacontext.evaluation.cost_decode import (
    PLAIN,
    Arm,
    engine_arm,
    plain_arm,
    time_arms,
)
from megacontext.evaluation.cost_ingest import ingest_ratio
from megacontext.evaluation.cost_kv import incremental_losses, refocus_ratios
from megacontext.evaluation.cost_memories import Say, append_prose, approach, make_memory
from megacontext.evaluation.cost_process import resident_bytes
from megacontext.evaluation.metrics import Estimate, mean, median_of_ratios, ratio_of_medians
from megacontext.memory import Memory
from megacontext.runtime.engine import Engine
from megacontext.runtime.reading import KVMode, kv_mode
from megacontext.runtime.session import Session

_MODES: tuple[KVMode, ...] = get_args(KVMode)
_PROMPT_TOKENS = 16
_REMEMBERED = "remembered"


def run_cost_suite(config: CostSuiteConfig, progress: Say | None = None) -> dict[str, Estimate]:
    """Ratios of cost, each of things timed by turns in this run.

    Args:
        config: the suite.
        progress: called with what is being measured.

    Raises:
        ConfigError: models and sizes do not fit together.
        InputError: a sample cannot be taken with these sizes.
        MemoryStoreError: a memory cannot be written.
    """
    with (
        tempfile.TemporaryDirectory(prefix="megacontext-cost-") as scratch,
        Session(config.session) as session,
    ):
        suite = _CostSuite(config, session, Path(scratch), progress or _silent)
        return suite.run()


def _silent(_: str) -> None:
    """Nobody wants to know."""


class _CostSuite:
    """One run: the models, and the memories it is about."""

    def __init__(self, config: CostSuiteConfig, session: Session, scratch: Path, say: Say) -> None:
        self.config = config
        self.session = session
        self.scratch = scratch
        self.say = say
        folder = config.folder or scratch
        folder.mkdir(parents=True, exist_ok=True)
        self.paths = {
            length: make_memory(session, folder, length, config.seed, say)
            for length in config.lengths
        }

    def run(self) -> dict[str, Estimate]:
        """All measures, by their published names."""
        config = self.config
        results = self._decoding()
        results["rss_flatness"] = self._rss_flatness()
        self.say("refocusing in both KV modes")
        shortest = self.paths[config.lengths[0]]
        results |= refocus_ratios(config, self.session, shortest, self._draw)
        self.say("predicting in both KV modes")
        results |= incremental_losses(config, self.session)
        self.say("ingesting beside prefill")
        results["ingest_ratio"] = ingest_ratio(config, self.session, self.scratch)
        self.say("reopening")
        results["reopen_ratio"] = self._reopen_ratio()
        return results | self._disk()

    def _decoding(self) -> dict[str, Estimate]:
        """Decoding in both KV modes over every length, remembering, and by the base alone."""
        config, lengths = self.config, self.config.lengths
        n_tokens = config.decode_blocks * self.session.gistnet.config.block_size
        clock = time.process_time if config.clock == "cpu" else time.perf_counter
        arms: dict[str, Arm] = {}
        with ExitStack() as stack:
            for length in lengths:
                for mode in _MODES:
                    self.say(f"approaching the end of {length:,} tokens, {mode}")
                    memory = stack.enter_context(Memory.open(self.paths[length]))
                    engine = self._engine(memory, mode)
                    approach(engine, config.approach_blocks)
                    arms[_arm(mode, length)] = engine_arm(engine, n_tokens, clock)
            engine = self._remembering(lengths[0])
            memory = stack.enter_context(engine.memory)
            arms[_REMEMBERED] = engine_arm(engine, n_tokens, clock, remember=True)
            newest = memory.tokens(memory.n_tokens - config.engine.budget).long()
            arms[PLAIN] = plain_arm(self.session.base, newest, n_tokens, clock)
            self.say("decoding by turns")
            prompts = [self._draw(memory, _PROMPT_TOKENS, n) for n in range(config.repeats + 1)]
            seconds = time_arms(arms, prompts).seconds
        return decode_results(seconds, lengths, kv_mode(config.engine.kv, self.session.base))

    def _remembering(self, length: int) -> Engine:
        """An engine over a memory of its own, since that will grow."""
        engine = self.session.create(self.scratch / "remembered.mctx")
        append_prose(engine, length, self.config.seed)
        engine.focus.advance(length)
        approach(engine, self.config.approach_blocks)
        return engine

    def _engine(self, memory: Memory, mode: KVMode) -> Engine:
        engine = self.config.engine.model_copy(update={"kv": mode})
        return Engine(
            self.session.base,
            memory,
            gistnet=self.session.gistnet,
            lens=self.session.lens,
            policy=self.session.policy(),
            config=engine,
        )

    def _rss_flatness(self) -> Estimate:
        config = self.config
        held: dict[int, list[float]] = {length: [] for length in _ends(config.lengths)}
        for number in range(config.processes):
            for length, values in held.items():
                self.say(f"resident memory over {length:,} tokens, process {number + 1}")
                values.append(resident_bytes(config, self.paths[length]))
        short, long = (held[length] for length in _ends(config.lengths))
        return ratio_of_medians(long, short)

    def _reopen_ratio(self) -> Estimate:
        """Opening and one answer over an answer of a session that has answered before."""
        config, path = self.config, self.paths[self.config.lengths[-1]]
        fresh: list[float] = []
        warm: list[float] = []
        with self.session.open(path, writable=False).memory as memory:
            known = self.session.engine(memory)
            for number in range(config.reopenings + 1):
                prompt = self._draw(memory, _PROMPT_TOKENS, number)
                started = time.perf_counter()
                engine = self.session.open(path, writable=False)
                with engine.memory:
                    engine.ask(prompt, max_new_tokens=config.answer_tokens)
                opened = time.perf_counter()
                known.ask(prompt, max_new_tokens=config.answer_tokens)
                fresh.append(opened - started)
                warm.append(time.perf_counter() - opened)
        return ratio_of_medians(fresh[1:], warm[1:])

    def _disk(self) -> dict[str, Estimate]:
        """Bytes per token of the longest memory, in all and by part."""
        with Memory.open(self.paths[self.config.lengths[-1]]) as memory:
            stats = memory.stats()
        parts = {f"bytes_per_token.{part}": size for part, size in stats["bytes"].items()}
        whole = {"bytes_per_token": sum(parts.values()), **parts}
        return {name: mean([size / stats["tokens"]]) for name, size in whole.items()}

    def _draw(self, memory: Memory, n_tokens: int, number: int) -> str:
        """The text of tokens from anywhere in a history; the same number draws the same place."""
        rng = random.Random(f"cost/{self.config.seed}/{number}")
        start = rng.randrange(memory.n_tokens - n_tokens + 1)
        return self.session.base.decode(memory.tokens(start, start + n_tokens))


def decode_results(
    seconds: Mapping[str, Sequence[float]], lengths: Sequence[int], kv: KVMode
) -> dict[str, Estimate]:
    """Ratios of seconds per token.

    Args:
        seconds: by arm: ``MODE.LENGTH``, ``remembered`` and ``plain``.
        lengths: of the histories, shortest first.
        kv: the KV mode that a session has; its ratios stand without the mode's name, too.
    """
    results: dict[str, Estimate] = {}
    plain = seconds[PLAIN]
    short, long = _ends(lengths)
    for mode in (kv, *_MODES):
        end = "" if mode == kv and "decode_ratio" not in results else f".{mode}"
        results[f"decode_ratio{end}"] = median_of_ratios(plain, seconds[_arm(mode, short)])
        results[f"time_flatness{end}"] = median_of_ratios(
            seconds[_arm(mode, long)], seconds[_arm(mode, short)]
        )
    for mode in _MODES:
        for length in lengths[1:]:
            results[f"decode_ratio.{mode}.{length}"] = median_of_ratios(
                plain, seconds[_arm(mode, length)]
            )
    results[f"decode_ratio.{_REMEMBERED}"] = median_of_ratios(plain, seconds[_REMEMBERED])
    results["plain_tokens_per_s"] = ratio_of_medians([1.0] * len(plain), plain)
    return results


def _arm(mode: KVMode, length: int) -> str:
    return f"{mode}.{length}"


def _ends(lengths: Sequence[int]) -> tuple[int, int]:
    return lengths[0], lengths[-1]
