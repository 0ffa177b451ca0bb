"""A session's configuration, and the objects it stands for: models, policy, memory, engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import Field

from megacontext.closing import Closing
from megacontext.config import FrozenConfig
from megacontext.errors import MegaContextError, MemoryMismatchError
from megacontext.lensnet import LensNet, LensNetConfig
from megacontext.memory import KeyIndexConfig, Memory
from megacontext.memory.identity import GistDtype
from megacontext.memory.resident import LEAST_RESIDENT_MB, MOST_RESIDENT_MB
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.bulk_ingest import IngestConfig
from megacontext.runtime.companions import load_gistnet, load_lens
from megacontext.runtime.engine import Engine, EngineConfig
from megacontext.runtime.focus_policies import (
    FocusPolicy,
)
from megacontext.runtime.policy_names import PolicyName, make_policy
from megacontext.telemetry import JsonlSink, Telemetry


class SessionConfig(FrozenConfig):
    """Which models and habits a session has.

    Attributes:
        model: local folder, hub id, or ``bundled:NAME``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        device: where the base model runs.
        gistnet: folder of a GistNet checkpoint, ``bundled`` for the one shipped with the model, or
            ``mean``, the default: a gist is the mean of its span.
        gist_dtype: number format of a new memory's gists: ``fp16``, the default, ``bf16`` or
            ``int8``. For one that exists it is the memory's own; another one is refused, but by
            ``regist``, which converts.
        resident_mb: most MiB of a memory's mapped files that stay in RAM; ``None``: as the system
            likes. A search reads what was given back once more.
        lens: folder of a LensNet checkpoint, or ``none``. If not given, the one bundled with the
            model, if it fits the gists; policy ``lens`` without any starts untrained.
        policy: focus policy; ``auto``: ``lens`` where there is a LensNet, else ``lexical``.
        engine: budget and habits.
        key_index: how the lens's keys are searched once they are many.
        ingest: how files are read while they are taken in.
        telemetry: JSONL file that every step is written to.
    """

    model: str = "bundled:tiny"
    dtype: str = "float32"
    device: str = "cpu"
    gistnet: str | Path | None = None
    gist_dtype: GistDtype | None = None
    resident_mb: int | None = Field(default=None, ge=LEAST_RESIDENT_MB, le=MOST_RESIDENT_MB)
    lens: str | Path | None = None
    policy: PolicyName = "auto"
    engine: EngineConfig = EngineConfig()
    key_index: KeyIndexConfig = KeyIndexConfig()
    ingest: IngestConfig = IngestConfig()
    telemetry: Path | None = None


class DecodeConfig(FrozenConfig):
    """How an answer is decoded; what is ``None`` is left to the model's own settings.

    Attributes:
        max_new_tokens: most tokens of an answer.
        stop: text that ends an answer.
        look_again: text behind which the focus looks again while an answer is written; empty: what
            was found for the question holds.
        seed: of the sampler.
    """

    max_new_tokens: int = Field(default=128, ge=1)
    stop: str = ""
    look_again: str = "."
    seed: int = 0
    do_sample: bool | None = None
    temperature: float | None = Field(default=None, gt=0)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)

    def options(self) -> dict[str, object]:
        """The settings that :meth:`Engine.generate` takes, without those left to the model."""
        return {key: value for key, value in self.model_dump().items() if value is not None}


class Session(Closing):
    """Loads what a :class:`SessionConfig` names and opens engines over memories.

    Args:
        config: the session.

    Raises:
        ModelError: the base model or a checkpoint cannot be loaded.
        ConfigError: the dtype or device does not exist here.
    """

    def __init__(self, config: SessionConfig) -> None:
        self.config = config
        self.base = BaseModel.from_pretrained(
            config.model, dtype=config.dtype, device=config.device
        )
        self.gistnet = load_gistnet(config.gistnet, self.base, config.model)
        self.lens = load_lens(config.lens, self.base, self.gistnet, config.model)
        sink = None if config.telemetry is None else JsonlSink(config.telemetry)
        self.telemetry = Telemetry(sink)

    def create(self, path: Path) -> Engine:
        """Makes an empty memory for these models.

        Raises:
            MemoryStoreError: it cannot be made.
            ConfigError, CheckpointError: the session's models and sizes do not fit together.
        """
        identity = Engine.identity(self.base, self.gistnet, self.lens)
        if self.config.gist_dtype is not None:
            identity = replace(identity, gist_dtype=self.config.gist_dtype)
        made = Memory.create(path, identity, resident_mb=self.config.resident_mb)
        return self._engine_or_close(made)

    def open(self, path: Path, *, writable: bool) -> Engine:
        """Opens a memory made for these models.

        Raises:
            MemoryStoreError: there is none, it belongs to other models, or it is in use.
            ConfigError, CheckpointError: the session's models and sizes do not fit together.
        """
        expect = Engine.identity(self.base, self.gistnet, self.lens)
        mode, limit = ("a" if writable else "r"), self.config.resident_mb
        opened = Memory.open(path, mode, expect=expect, resident_mb=limit)
        engine = self._engine_or_close(opened)
        have, wanted = engine.memory.identity.gist_dtype, self.config.gist_dtype
        if wanted not in (None, have):
            engine.memory.close()
            raise MemoryMismatchError(
                f"{path}: its gists are {have}, not {wanted}; leave gist_dtype out, or convert "
                f"them with `megacontext regist {path} --set gist_dtype={wanted}`"
            )
        return engine

    def engine(self, memory: Memory) -> Engine:
        """An engine over an open memory."""
        return Engine(
            self.base,
            memory,
            gistnet=self.gistnet,
            lens=self.lens,
            policy=self.policy(),
            config=self.config.engine,
            telemetry=self.telemetry,
        )

    def policy(self) -> FocusPolicy:
        """A new policy as configured."""
        lens = self.lens
        if lens is None and self.config.policy == "lens":
            lens = self._untrained_lens()
        return make_policy(self.config.policy, lens, self.config.key_index)

    def close(self) -> None:
        """Ends the telemetry."""
        self.telemetry.close()

    def _engine_or_close(self, memory: Memory) -> Engine:
        try:
            return self.engine(memory)
        except MegaContextError:
            memory.close()  # or nobody could write to it while this process lives
            raise

    def _untrained_lens(self) -> LensNet:
        """Weighs proposals by their BM25 score alone.

        Its keys would mean nothing, so none are stored: any memory without keys will do.
        """
        return LensNet(
            LensNetConfig(
                d_model=self.base.d_model,
                gist_width=self.gistnet.config.gist_width,
                lexical_prior=1.0,
            )
        ).eval()
