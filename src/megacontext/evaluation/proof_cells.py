"""The cells of the suite ``proof``: a task at a length, and the questions that belong to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megacontext.evaluation.babilong_questions import babilong_questions
from megacontext.evaluation.long_questions import LongQuestion
from megacontext.evaluation.noise import NoiseTokens
from megacontext.evaluation.proof_config import MAIN, Length, ProofSuiteConfig, tokens_of
from megacontext.evaluation.recall_questions import RecallConfig, recall_questions
from megacontext.evaluation.ruler_questions import RulerConfig, ruler_questions

Family = Literal["babilong", "ruler", "recall", "niah_depth"]
FAR_TASK = "qa1"
COUNTING = ("cwe", "fwe")
"""Tasks whose evidence is all of a text: no budget holds it raw, and no oracle can point at it."""
_DEPTH_TASK = "niah_single"


@dataclass(frozen=True)
class Cell:
    """One task at one length.

    Attributes:
        family: which questions.
        task: of the family.
        length: of every history.
        questions: how many.
        depth: where the needle stands, in the heat map.
    """

    family: Family
    task: str
    length: Length
    questions: int
    depth: float | None = None

    @property
    def name(self) -> str:
        """As results call it, for example ``babilong.qa1.4k`` or ``niah_depth.4k.0.5``."""
        if self.depth is not None:
            return f"{self.family}.{self.length}.{self.depth:g}"
        return f"{self.family}.{self.task}.{self.length}"

    def settings(self, config: ProofSuiteConfig) -> dict[str, Any]:
        """What else than its name decides which questions are asked."""
        own: dict[str, Any] = {
            "seed": config.seed,
            "corpus": [path.name for path in config.corpus],
            "held_out_every": config.held_out_every,
        }
        if self.family in ("ruler", "niah_depth"):
            own["wording"] = config.wording
        if self.family == "recall":
            own |= {"facts": config.facts, "asked": config.asked}
        return own

    def ask(self, noise: NoiseTokens, config: ProofSuiteConfig) -> Iterator[LongQuestion]:
        """The questions; those about one history follow each other.

        Raises:
            DataError: the bAbI files are not there.
            InputError: the statements are longer than the history.
        """
        length, seed = tokens_of(self.length), config.seed
        if self.family == "babilong":
            return babilong_questions(
                noise, config.babi, self.task, count=self.questions, length=length, seed=seed
            )
        if self.family == "recall":
            recall = RecallConfig.parse(
                {
                    "task": self.task,
                    "facts": config.facts,
                    # Few facts of a history are corrected.
                    "asked": 1 if self.task == "corrections" else config.asked,
                }
            )
            return recall_questions(noise, recall, count=self.questions, length=length, seed=seed)
        ruler = RulerConfig.parse(
            {"task": self.task, "wording": config.wording, "depth": self.depth}
        )
        return ruler_questions(noise, ruler, count=self.questions, length=length, seed=seed)


def plan(config: ProofSuiteConfig) -> list[Cell]:
    """All cells, short histories first, so that what is wrong shows early."""
    cells: list[Cell] = []
    for length in sorted(dict.fromkeys(config.lengths), key=tokens_of):
        groups: tuple[tuple[Family, tuple[str, ...]], ...] = (
            ("babilong", config.babilong),
            ("ruler", config.ruler),
            ("recall", config.recall),
        )
        for family, tasks in groups:
            cells += [Cell(family, task, length, config.asked_at(length)) for task in tasks]
        if config.depth_questions:
            cells += [
                Cell("niah_depth", _DEPTH_TASK, length, config.depth_questions, depth)
                for depth in config.depths
            ]
    if FAR_TASK in config.babilong:
        cells += [
            Cell("babilong", FAR_TASK, length, config.asked_at(length))
            for length in sorted(dict.fromkeys(config.far_lengths), key=tokens_of)
        ]
    return list(dict.fromkeys(cells))


def asked_of(cell: Cell, config: ProofSuiteConfig) -> dict[str, int]:
    """How many of a cell's questions each rival answers.

    The heat map is MegaContext's alone, and the oracle is left out where it has nothing to tell.
    """
    far = cell.length in config.far_lengths and cell.length not in config.lengths
    names = [
        name
        for name in config.names
        if (cell.family != "niah_depth" or name == MAIN)
        and (cell.task not in COUNTING or name != "oracle")
        and (not far or not config.far_rivals or name in config.far_rivals)
    ]
    return {
        name: min(cell.questions, config.slow_questions)
        if name in config.slow_rivals
        else cell.questions
        for name in names
        if not _too_long(name, cell.length, config, shared=cell.family == "recall")
    }


def asked_for_prose(config: ProofSuiteConfig) -> list[str]:
    """The rivals that predict the stream."""
    return [name for name in config.names if not _too_long(name, config.prose, config, shared=True)]


def _too_long(name: str, length: Length, config: ProofSuiteConfig, *, shared: bool) -> bool:
    """Whether a rival reads histories with a model, and would take too long for one of a length.

    ``shared``: whether many questions are about the same one.
    """
    if name not in config.readers:
        return False
    shared = shared and name not in config.readers_by_question
    most = config.readers_recall_up_to if shared else config.readers_up_to
    return tokens_of(length) > tokens_of(most) or (shared and length in config.readers_skip)


def by_history(questions: Iterator[LongQuestion]) -> Iterator[list[LongQuestion]]:
    """Groups of questions that hold the same history."""
    group: list[LongQuestion] = []
    for question in questions:
        if group and question.history is not group[0].history:
            yield group
            group = []
        group.append(question)
    if group:
        yield group
