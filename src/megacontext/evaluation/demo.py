"""The demo: a real book streams through a small window, then facts from far beyond it are asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
import zstandard
from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.errors import InputError
from megacontext.evaluation.baselines import SlidingWindow
from megacontext.evaluation.focus_playback import Frame, write_playback
from megacontext.evaluation.metrics import Estimate, mean
from megacontext.memory import Memory, Source
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.companions import load_gistnet, load_lens
from megacontext.runtime.engine import Engine, EngineConfig
from megacontext.runtime.focus_loop import FocusRecord
from megacontext.runtime.focus_policies import FocusPolicy, LexicalPolicy, RecencyPolicy
from megacontext.runtime.oracle_policy import OraclePolicy
from megacontext.runtime.policy_names import make_policy
from megacontext.tasks.documents import QUESTION_TEMPLATE, Theme, final_answer
from megacontext.tasks.fact_themes import FactThemes
from megacontext.tasks.planting import PlantedFact, plant
from megacontext.tasks.synonym_themes import SynonymThemes

_STOP = "\n"


class DemoConfig(FrozenConfig):
    """What the demo shows.

    Attributes:
        model: base model.
        gistnet: GistNet checkpoint, ``bundled`` or ``mean``, which is the default.
        lens: LensNet checkpoint, or ``none``; if not given, the one bundled with the model, if it
            fits the gists.
        book: text file; the bundled book if none.
        facts: how many facts are planted and asked.
        paraphrased: share of them that are asked in other words than the book says them.
        nll_points: at how many places of the stream the next tokens' NLL is measured.
        max_characters: of the book, to make it shorter; 0 takes all.
        frames: pictures of the stream in the playback.
        engine: budget and habits.
        seed: of facts and their places.
    """

    model: str = "bundled:tiny"
    gistnet: str | Path | None = None
    lens: str | Path | None = None
    book: Path | None = None
    facts: int = Field(default=20, ge=1, le=200)
    paraphrased: float = Field(default=0.3, ge=0, le=1)
    nll_points: int = Field(default=96, ge=1)
    max_characters: int = Field(default=0, ge=0)
    frames: int = Field(default=120, ge=1)
    max_new_tokens: int = Field(default=16, ge=1)
    engine: EngineConfig = EngineConfig()
    seed: int = 0


@dataclass(frozen=True)
class Answered:
    """One planted fact with what every arm answered."""

    fact: PlantedFact
    token: int
    answers: dict[str, str]

    def correct(self, arm: str) -> bool:
        """Whether an arm's answer is exactly the expected one."""
        return final_answer(self.answers[arm]) == self.fact.answer


@dataclass
class DemoResult:
    """What the demo measured."""

    history_tokens: int
    budget: int
    nll: dict[str, Estimate]
    answered: list[Answered]
    edits: int
    swap_rate: float
    residency: float
    utilization: float
    frames: list[Frame] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        """The arms that answered, MegaContext first."""
        return list(self.answered[0].answers)

    def score(self, arm: str) -> int:
        """Correct answers of an arm."""
        return sum(item.correct(arm) for item in self.answered)

    def as_json(self) -> dict[str, object]:
        """The result as ``megacontext demo --json`` prints it."""
        asked = len(self.answered)
        nll: dict[str, object] = {
            arm: {"value": round(e.value, 4), "n": e.n, "ci95": [round(e.low, 4), round(e.high, 4)]}
            for arm, e in self.nll.items()
        }
        # Kept as a key so that readers of the line need not guess why an arm is missing.
        nll["full"] = None
        return {
            "history_tokens": self.history_tokens,
            "budget": self.budget,
            "nll": nll,
            "answers": {arm: {"correct": self.score(arm), "asked": asked} for arm in self.arms},
            "focus": {
                "edits": self.edits,
                "swap_rate": round(self.swap_rate, 4),
                "residency": round(self.residency, 2),
                "utilization": round(self.utilization, 4),
            },
        }


OnRecord = Callable[[FocusRecord, int], None]
OnAnswer = Callable[[Answered], None]


class Demo:
    """One run over one memory.

    Args:
        config: what to show.
        base: the base model.
        memory_path: where the memory is made.
    """

    def __init__(self, config: DemoConfig, base: BaseModel, memory_path: Path) -> None:
        self.config = config
        self.base = base
        rng = random.Random(f"demo/{config.seed}")
        theme = _facts(rng, config.facts, round(config.paraphrased * config.facts))
        self.text, self.facts = plant(read_book(config), theme, rng)
        # The place of a fact in tokens: everything before it, tokenized as one text.
        self.fact_tokens = _token_places(base, self.text, [f.character for f in self.facts])
        self.total_tokens = len(base.encode(self.text))
        self.gistnet = load_gistnet(config.gistnet, base, config.model)
        self.lens = load_lens(config.lens, base, self.gistnet, config.model)
        self.memory = Memory.create(memory_path, Engine.identity(base, self.gistnet, self.lens))
        self.engine = self._engine(make_policy("auto", self.lens))
        self.window = SlidingWindow(base, self.memory, config.engine.budget)

    def run(
        self, on_record: OnRecord | None = None, on_answer: OnAnswer | None = None
    ) -> DemoResult:
        """Streams the book, then asks.

        Args:
            on_record: called after every refocus of the stream with the total of tokens.
            on_answer: called after every question.
        """
        size = self.memory.identity.block_size
        rounds = self.total_tokens // size
        measured = set(_evenly(rounds, self.config.nll_points))
        pictured = set(_evenly(rounds, self.config.frames))
        losses: dict[str, list[float]] = {"megacontext": [], "window": []}
        frames: list[Frame] = []
        for index, record in enumerate(self._stream()):
            if index in pictured:
                frames.append(Frame("the book streams through", record))
            if index in measured:
                self._measure(record.cursor, losses)
            if on_record is not None:
                on_record(record, self.total_tokens)
        meter = self.engine.focus.meter
        edits = sum(len(record.edits) for record in self.engine.focus.records)
        result = DemoResult(
            history_tokens=self.memory.n_tokens,
            budget=self.config.engine.budget,
            nll={arm: mean(values) for arm, values in losses.items() if values},
            answered=[],
            edits=edits,
            swap_rate=meter.swap_rate,
            residency=meter.residency,
            utilization=meter.utilization,
            frames=frames,
        )
        for fact, token in zip(self.facts, self.fact_tokens, strict=True):
            answered = self._ask(fact, token)
            result.answered.append(answered)
            frames.append(Frame(f"asked: {fact.question}", self.engine.focus.records[-1]))
            if on_answer is not None:
                on_answer(answered)
        return result

    def write_playback(self, path: Path, result: DemoResult) -> None:
        """Writes the focus over time as one self-contained page."""
        write_playback(
            path,
            result.frames,
            title="MegaContext: a book streams through a small window",
            total_tokens=result.history_tokens,
            budget=result.budget,
            marks=self.fact_tokens,
        )

    def _engine(self, policy: FocusPolicy) -> Engine:
        return Engine(
            self.base,
            self.memory,
            gistnet=self.gistnet,
            lens=self.lens,
            policy=policy,
            config=self.config.engine,
        )

    def _stream(self) -> Iterator[FocusRecord]:
        source = Source(uri="demo:book", media_type="text/plain", tags=("demo",))
        return self.engine.stream(self.text, source)

    def _measure(self, cursor: int, losses: dict[str, list[float]]) -> None:
        """NLL per token of the next block, for both arms, where it is in the memory already."""
        targets = self.memory.tokens(
            cursor, min(cursor + self.memory.identity.block_size, self.memory.n_tokens)
        ).long()
        if not len(targets):
            return
        nothing = torch.empty(0, dtype=torch.int64)
        reading = self.engine.reader.read(self.engine.context, nothing)
        losses["megacontext"].append(float(self.base.nll(reading, targets).mean()))
        losses["window"].append(float(self.window.nll(cursor, targets).mean()))

    def _ask(self, fact: PlantedFact, token: int) -> Answered:
        prompt = QUESTION_TEMPLATE.format(question=fact.question)
        limit = self.config.max_new_tokens
        size = self.memory.identity.block_size
        end = token + len(self.base.encode(fact.statement))
        future = self.base.encode(f" {fact.answer}\n")
        hints = range(token // size, end // size + 1)
        rivals: dict[str, FocusPolicy] = {} if self.lens is None else {"lexical": LexicalPolicy()}
        rivals["recency"] = RecencyPolicy()
        rivals["oracle"] = OraclePolicy(future, hints, proposals=2)
        answers = {
            "megacontext": self.engine.ask(
                prompt, max_new_tokens=limit, stop=_STOP, query=fact.question
            ),
            "window": self.window.answer(prompt, fact.question, max_new_tokens=limit, stop=_STOP),
        }
        for name, policy in rivals.items():
            rival = self._engine(policy)
            answers[name] = rival.ask(prompt, max_new_tokens=limit, stop=_STOP, query=fact.question)
        return Answered(fact, token, answers)


def _facts(rng: random.Random, count: int, paraphrased: int) -> Theme:
    """``count`` facts in random order, each with its question; some are asked in other words."""
    themes = (
        FactThemes(rng, "held_out").plain(count - paraphrased),
        SynonymThemes(rng, "held_out").theme(paraphrased),
    )
    pairs = [
        pair for theme in themes for pair in zip(theme.statements, theme.questions, strict=True)
    ]
    rng.shuffle(pairs)
    return Theme([statement for statement, _ in pairs], [question for _, question in pairs])


def read_book(config: DemoConfig) -> str:
    """The book's text.

    Raises:
        InputError: the file cannot be read as UTF-8 text.
    """
    if config.book is None:
        bundled = resources.files("megacontext").joinpath("assets/books/lilac_fairy_book.txt.zst")
        raw = zstandard.ZstdDecompressor().stream_reader(bundled.read_bytes()).read()
    else:
        try:
            raw = config.book.read_bytes()
        except OSError as error:
            raise InputError(f"{config.book}: cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{config.book}: not UTF-8 text (byte {error.start})") from None
    return text[: config.max_characters or None]


def _evenly(total: int, count: int) -> list[int]:
    """``count`` numbers below ``total``, evenly spaced, the last one close to the end."""
    return [(i + 1) * total // (count + 1) for i in range(count)]


def _token_places(base: BaseModel, text: str, characters: list[int]) -> list[int]:
    """Index of the first token at or behind each character (ascending) of a text."""
    places: list[int] = []
    done = count = 0
    for character in characters:
        # Cut before the space, where byte-level BPE never merges across.
        count += len(base.encode(text[done : character - 1]))
        places.append(count)
        done = character - 1
    return places
