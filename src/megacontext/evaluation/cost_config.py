"""Configuration of suite ``cost``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from megacontext.config import FrozenConfig
from megacontext.memory import KeyIndexConfig
from megacontext.runtime.engine import EngineConfig
from megacontext.runtime.policy_names import PolicyName
from megacontext.runtime.session import SessionConfig


class CostSuiteConfig(FrozenConfig):
    """What is timed, how often, and over how much history.

    Attributes:
        model: base model.
        gistnet: GistNet checkpoint, ``bundled`` or ``mean``, which is the default.
        lens: LensNet checkpoint, or ``none``; the one bundled with the model, if it fits the gists.
        policy: focus policy; ``auto``: ``lens`` where there is a LensNet, else ``lexical``.
        key_index: how the lens's keys are searched once they are many.
        engine: budget and habits.
        lengths: tokens of the histories, shortest first; the first and the last are compared.
        folder: where their memories are kept for another run; a temporary folder if none.
        clock: of the decode comparison. ``wall``, or ``cpu``, this process's processor time, for a
            machine that others use as well; it leaves out waiting for the disk, and for a GPU.
        repeats: how often every arm of the decode comparison is timed.
        decode_blocks: refocuses in each of these samples, of one block of tokens each.
        approach_blocks: blocks at the end of a history that the focus follows before it decodes, so
            that the window is as full and as calm as in the middle of a session.
        processes: fresh processes per length whose resident memory is taken.
        reopenings: how often a memory is opened anew for one answer.
        answer_tokens: most tokens of these answers.
        ingest_repeats: how often ingest and prefill are timed.
        ingest_tokens: tokens of one such ingest.
        prefill_windows: windows of one such prefill.
        prefill_batches: windows per forward to choose from; the fastest counts.
        refocuses: refocuses timed in both KV modes.
        refocus_edits: edits that a refocus must have made to count.
        prose_streams: streams of prose on which both KV modes are compared.
        prose_history: tokens before each of them.
        prose_blocks: blocks of each stream; the first is read anew by both modes and left out.
        recall_answers: answers on which they are compared.
        recall_history: tokens of the histories that are asked about.
        seed: of everything drawn.
    """

    model: str = "bundled:tiny"
    gistnet: str | Path | None = None
    lens: str | Path | None = None
    policy: PolicyName = "auto"
    key_index: KeyIndexConfig = KeyIndexConfig()
    engine: EngineConfig = EngineConfig()
    lengths: tuple[int, ...] = (10_000, 10_000_000)
    folder: Path | None = None
    clock: Literal["wall", "cpu"] = "wall"
    repeats: int = Field(default=16, ge=2)
    decode_blocks: int = Field(default=4, ge=1)
    approach_blocks: int = Field(default=48, ge=0)
    processes: int = Field(default=3, ge=1)
    reopenings: int = Field(default=8, ge=1)
    answer_tokens: int = Field(default=32, ge=1)
    ingest_repeats: int = Field(default=8, ge=2)
    ingest_tokens: int = Field(default=65_536, ge=1_024)
    prefill_windows: int = Field(default=16, ge=1)
    prefill_batches: tuple[int, ...] = (1, 4, 16)
    refocuses: int = Field(default=100, ge=2)
    refocus_edits: int = Field(default=4, ge=1)
    prose_streams: int = Field(default=2, ge=1)
    prose_history: int = Field(default=8_192, ge=1)
    prose_blocks: int = Field(default=33, ge=2)
    recall_answers: int = Field(default=20, ge=1)
    recall_history: int = Field(default=8_192, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if len(self.lengths) < 2 or list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(
                f"lengths is {list(self.lengths)}; name at least two, each once, shortest first"
            )
        if self.lengths[0] < 2 * self.engine.budget:
            raise ValueError(
                f"the shortest length is {self.lengths[0]}; a history must be twice as long as the "
                f"budget ({self.engine.budget}), or nothing lies outside the window"
            )
        if not self.prefill_batches or min(self.prefill_batches) < 1:
            raise ValueError(
                f"prefill_batches is {list(self.prefill_batches)}; name numbers of 1 or more"
            )
        return self

    @property
    def session(self) -> SessionConfig:
        """Models and habits as a session has them."""
        return SessionConfig(
            model=self.model,
            gistnet=self.gistnet,
            lens=self.lens,
            policy=self.policy,
            key_index=self.key_index,
            engine=self.engine,
        )
