"""The proof-of-concept loop: a short session whose expansions and collapses can be followed."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.evaluation.demo import DemoConfig, read_book
from megacontext.memory import Source
from megacontext.runtime.engine import Engine
from megacontext.runtime.focus_loop import FocusRecord
from megacontext.runtime.recording import SessionRecording
from megacontext.runtime.session import Session, SessionConfig
from megacontext.tasks.documents import QUESTION_TEMPLATE
from megacontext.tasks.fact_themes import FactThemes
from megacontext.tasks.planting import plant


class PocLoopConfig(FrozenConfig):
    """A short session.

    Attributes:
        session: models and habits.
        text: file to read; the bundled book if none.
        characters: how much of it.
        facts: planted and asked at the end.
        log_every: refocuses between two lines of the log; those of a question are all shown.
        max_new_tokens: most tokens of an answer.
        seed: of the facts and their places.
        record: file that the session is written to, content and all, for ``tools.replay_session``;
            none if not given.
    """

    session: SessionConfig = SessionConfig()
    text: Path | None = None
    characters: int = Field(default=24_000, ge=1_000)
    facts: int = Field(default=4, ge=1)
    log_every: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=16, ge=1)
    seed: int = 0
    record: Path | None = None


def run_poc_loop(
    config: PocLoopConfig,
    say: Callable[[str], None],
    watch: Callable[[FocusRecord], None] | None = None,
) -> dict[str, Any]:
    """Streams a text under budget, asks its planted facts, and tells what the focus did.

    Args:
        config: the session.
        say: takes the log, line by line.
        watch: is shown every refocus.

    Returns:
        Answers, edits, swap rate and the state of the engine.
    """
    rng = random.Random(f"poc/{config.seed}")
    book = read_book(DemoConfig(book=config.text, max_characters=config.characters))
    text, facts = plant(book, FactThemes(rng).plain(config.facts), rng)
    asked: list[dict[str, Any]] = []
    with (
        Session(config.session) as session,
        tempfile.TemporaryDirectory(prefix="megacontext-poc-") as folder,
        _opened(session, Path(folder) / "poc.mctx", config.record) as (engine, speaker),
    ):
        say(f"budget {config.session.engine.budget}, policy {engine.focus.policy.name}")
        edits = 0
        for record in speaker.stream(text, Source(uri="poc:text")):
            edits += len(record.edits)
            if watch is not None:
                watch(record)
            if record.round % config.log_every == 0:
                _log_record(record, say)
        for fact in facts:
            before = engine.focus.state.round
            prompt = QUESTION_TEMPLATE.format(question=fact.question)
            answer = speaker.ask(
                prompt, max_new_tokens=config.max_new_tokens, stop="\n", query=fact.question
            ).strip()
            for record in engine.focus.records:
                if record.round > before:
                    _log_record(record, say)
                    if watch is not None:
                        watch(record)
            say(f"asked {fact.question!r}: {answer!r}, expected {fact.answer!r}")
            asked.append({"question": fact.question, "answer": answer, "expected": fact.answer})
        return {"answers": asked, "edits": edits, "state": _state(engine)}


@contextmanager
def _opened(
    session: Session, memory: Path, record: Path | None
) -> Generator[tuple[Engine, Engine | SessionRecording]]:
    """An engine over a new memory, and what to call: itself, or its recording."""
    if record is None:
        engine = session.create(memory)
        with engine.memory:
            yield engine, engine
    else:
        with SessionRecording(session, memory, record) as recording:
            yield recording.engine, recording


def _state(engine: Engine) -> dict[str, Any]:
    state = engine.state()
    return {
        "cursor": state.cursor,
        "budget": state.budget,
        "cost": state.cost,
        "entries": {f"L{level}": count for level, count in state.entries.items()},
        "rounds": state.rounds,
        "swap_rate": state.swap_rate,
        "residency": state.residency,
    }


def _log_record(record: FocusRecord, say: Callable[[str], None]) -> None:
    levels = record.spans[:, 0]
    counts = " ".join(
        f"L{level}:{int((levels == level).sum())}" for level in range(int(levels.max()) + 1)
    )
    say(f"refocus {record.round} at token {record.cursor}: cost {record.cost}, {counts}")
    for edit in record.edits:
        say(
            f"  {edit.kind} L{edit.level} [{edit.start}, {edit.end}) {edit.score:+.2f} nats, "
            f"{edit.cost_change:+d} token-equivalents ({edit.reason})"
        )
