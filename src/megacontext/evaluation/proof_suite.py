"""Suite ``proof``: MegaContext beside what a user would pick instead, at equal budget."""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megacontext.errors import InputError
from megacontext.evaluation.long_history import remember
from megacontext.evaluation.long_questions import LongQuestion
from megacontext.evaluation.metrics import Estimate
from megacontext.evaluation.noise import NoiseTokens
from megacontext.evaluation.proof_asking import ask, make_rival, peak_rss_bytes
from megacontext.evaluation.proof_cells import (
    Cell,
    asked_for_prose,
    asked_of,
    by_history,
    plan,
)
from megacontext.evaluation.proof_config import ProofSuiteConfig
from megacontext.evaluation.proof_prose import block_losses, positions, prose_stream
from megacontext.evaluation.proof_records import Record, Records
from megacontext.evaluation.proof_results import Measured, estimates, facts
from megacontext.evaluation.proof_setup import ProofSetup
from megacontext.evaluation.report import current_commit
from megacontext.memory import Memory

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProofResult:
    """What a run found.

    Attributes:
        results: estimates by their published names.
        facts: what else the report tells: set-up, scores of all questions, the NLL along the
            stream, and who could not be asked.
    """

    results: dict[str, Estimate]
    facts: dict[str, Any]


def run_proof_suite(
    config: ProofSuiteConfig, progress: Callable[[str], None] | None = None
) -> ProofResult:
    """Asks every rival every question that ``config.work`` does not know the answer to.

    Args:
        config: the suite.
        progress: told what is being done.

    Raises:
        ConfigError: a rival cannot be made here, or a size does not fit.
        DataError: the bAbI files or the corpus are not there.
        InputError: a history is too short for its statements, or ``work`` cannot be used.
    """
    with tempfile.TemporaryDirectory(prefix="megacontext-proof-") as folder:
        return _ProofRun(config, Path(folder), progress or _silent).run()


def _silent(_: str) -> None:
    """Nobody wants to know."""


class _ProofRun:
    def __init__(
        self, config: ProofSuiteConfig, folder: Path, progress: Callable[[str], None]
    ) -> None:
        self.config = config
        self.folder = folder
        self.progress = progress
        self.records = Records(config.work)
        self.setup = ProofSetup(config)
        self.cells = plan(config)
        self.commit = current_commit()
        self.done = 0
        self.total = sum(sum(asked_of(cell, config).values()) for cell in self.cells)

    @cached_property
    def noise(self) -> NoiseTokens:
        return NoiseTokens.read(self.setup.base, self.config.corpus, self.config.held_out_every)

    def run(self) -> ProofResult:
        self._check_rivals()
        if self.config.prose_points:
            self._predict_prose()
        for cell in self.cells:
            self._run_cell(cell)
        measured = Measured(
            config=self.config,
            cells={cell: self._known(cell) for cell in self.cells},
            prose=self._known_prose() if self.config.prose_points else {},
        )
        return ProofResult(
            estimates(measured), {"setup": self.setup.described(), **facts(measured)}
        )

    def _check_rivals(self) -> None:
        """Makes every rival once, so that a missing package does not end a night's work."""
        ids = torch.zeros(self.setup.gistnet.config.block_size, dtype=torch.int64)
        with self._memory(ids) as (memory, _):
            for name in self.config.names:
                make_rival(name, self.setup, memory)

    def _known(self, cell: Cell) -> dict[str, list[Record]]:
        """What is known of every rival that a cell asks, in the order of the questions."""
        found: dict[str, list[Record]] = {}
        for name, questions in asked_of(cell, self.config).items():
            digest = self.setup.digest(name, cell.settings(self.config))
            records = self.records.of(cell.name, name, digest)
            found[name] = [records[number] for number in sorted(records) if number < questions]
        return found

    def _run_cell(self, cell: Cell) -> None:
        asked, known = asked_of(cell, self.config), self._known(cell)
        complete = [
            name
            for name, questions in asked.items()
            if len(known[name]) == questions or any(record.refused for record in known[name])
        ]
        self.done += sum(asked[name] for name in complete)
        missing = {name: questions for name, questions in asked.items() if name not in complete}
        if not missing:
            return
        after = self.done + sum(missing.values())
        self.done += sum(len(known[name]) for name in missing)
        first = 0
        for history, questions in enumerate(by_history(cell.ask(self.noise, self.config))):
            wanted = {name: range(first, count) for name, count in missing.items()}
            self._run_history(cell, history, questions, wanted)
            first += len(questions)
            if first >= max(missing.values()):
                break
        self.done = after
        _log.info("%s: %s", cell.name, ", ".join(missing))

    def _run_history(
        self,
        cell: Cell,
        history: int,
        questions: Sequence[LongQuestion],
        wanted: Mapping[str, range],
    ) -> None:
        """Asks those who have not answered all they are wanted for.

        ``wanted`` begins with the first question's number in the cell and may end behind, or
        before, the last one's.
        """
        settings = cell.settings(self.config)
        todo: dict[str, list[int]] = {}
        for name, numbers in wanted.items():
            digest = self.setup.digest(name, settings)
            known = self.records.of(cell.name, name, digest)
            left = [number for number in numbers[: len(questions)] if number not in known]
            if left and not any(record.refused for record in known.values()):
                todo[name] = left
        if not todo:
            return
        tokens = questions[0].history
        self._say(f"{cell.name}: taking in history {history + 1}")
        with self._memory(tokens) as (memory, ingest_s):
            for name, numbers in todo.items():
                rival, index_s = make_rival(name, self.setup, memory)
                digest = self.setup.digest(name, settings)
                for number in numbers:
                    self._say(f"{cell.name}: question {number + 1}, {name}")
                    record = self._record(
                        cell.name,
                        name,
                        digest,
                        number=number,
                        history=history,
                        tokens=len(tokens),
                        ingest_s=ingest_s,
                        index_s=index_s,
                        **ask(rival, questions[number - wanted[name].start]),
                    )
                    self.records.add([record])
                    self.done += 1
                    if record.refused:
                        break

    def _predict_prose(self) -> None:
        missing = [name for name, records in self._known_prose().items() if not records]
        if not missing:
            return
        ids = prose_stream(self.setup.base, self.config)
        self._say(f"{self._prose}: taking in the stream")
        with self._memory(ids) as (memory, ingest_s):
            for name in missing:
                self.records.add(self._losses(name, memory, ingest_s))
                _log.info("%s: %s", self._prose, name)

    def _losses(self, name: str, memory: Memory, ingest_s: float) -> Iterator[Record]:
        """Records of all blocks; of the refusal alone where the rival refuses one."""
        rival, index_s = make_rival(name, self.setup, memory)
        size = memory.identity.block_size
        starts = positions(memory.n_tokens, self.config.prose_points, size)
        found: list[dict[str, Any]] = []
        try:
            for start, loss, seconds in block_losses(rival, memory, starts):
                self._say(f"{self._prose}: at token {start:,}, {name}")
                found.append({"position": start, "nll": loss, "seconds": seconds})
        except InputError as error:
            found = [{"refused": str(error)}]
        digest = self.setup.digest(name, self._prose_settings())
        for number, measured in enumerate(found):
            yield self._record(
                self._prose,
                name,
                digest,
                number=number,
                tokens=memory.n_tokens,
                ingest_s=ingest_s,
                index_s=index_s,
                **measured,
            )

    @property
    def _prose(self) -> str:
        return f"prose.{self.config.prose}"

    def _prose_settings(self) -> dict[str, Any]:
        return {
            "corpus": [path.name for path in self.config.corpus],
            "held_out_every": self.config.held_out_every,
            "points": self.config.prose_points,
        }

    def _known_prose(self) -> dict[str, list[Record]]:
        """What is known of every rival that predicts the stream, in its order."""
        settings = self._prose_settings()
        known = {
            name: self.records.of(self._prose, name, self.setup.digest(name, settings))
            for name in asked_for_prose(self.config)
        }
        return {name: [found[number] for number in sorted(found)] for name, found in known.items()}

    def _record(self, cell: str, rival: str, setup: str, **measured: Any) -> Record:
        return Record(
            setup=setup,
            cell=cell,
            rival=rival,
            seed=self.config.seed,
            commit=self.commit,
            peak_rss_mb=peak_rss_bytes() / 1e6,
            **measured,
        )

    @contextmanager
    def _memory(self, tokens: Tensor) -> Generator[tuple[Memory, float]]:
        """A memory for as long as it is needed, and the seconds it took to make."""
        path = self.folder / "history.mctx"
        started = time.perf_counter()
        try:
            setup = self.setup
            memory = remember(setup.base, setup.gistnet, setup.lens, tokens, path)
            seconds = time.perf_counter() - started
            with memory:
                yield memory, seconds
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def _say(self, what: str) -> None:
        self.progress(f"{self.done:,} of {self.total:,} answers; {what}")
