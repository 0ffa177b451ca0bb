"""Records what LensNet saw in running sessions, and measures what it should have said."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megacontext.config import FrozenConfig
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet, Snapshot
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.counterfactual import Counterfactual
from megacontext.runtime.engine import Engine, EngineConfig
from megacontext.runtime.focus_policies import FocusView
from megacontext.runtime.lens_policy import LensPolicy
from megacontext.training.lens_texts import Ask, AskedText, LensTexts


class RecordConfig(FrozenConfig):
    """One round of sessions.

    Attributes:
        sessions: texts that are read and asked about.
        sessions_per_part: how many are written to disk at a time, of which an interruption takes
            no more.
        tokens: about how long texts are; each session draws one length.
        facts: about how many statements a text holds.
        asks: looks of a text that are recorded; each gives up to ``rounds`` snapshots.
        rounds: refocus rounds of a look that are recorded.
        calm: places of a text where nothing is asked and the text just goes on.
        horizon: tokens to come over which worth is measured where nothing is asked.
        proposals: blocks that each index proposes; BM25 adds neighbours of its hits.
        labelled: proposals of a snapshot whose worth is measured: first those that are known to
            hold evidence, then the one that the lens likes best of the others, since what looks
            like evidence teaches most, then some at random; 0: all of them.
        entries: working entries of a snapshot whose worth is measured as well.
    """

    sessions: int = Field(default=60, ge=1)
    sessions_per_part: int = Field(default=10, ge=1)
    tokens: tuple[Annotated[int, Field(ge=128)], ...] = Field(
        default=(4096, 16_384, 65_536), min_length=1
    )
    facts: int = Field(default=24, ge=1)
    asks: int = Field(default=6, ge=0)
    rounds: int = Field(default=2, ge=1)
    calm: int = Field(default=2, ge=0)
    horizon: int = Field(default=32, ge=1)
    proposals: int = Field(default=12, ge=1)
    labelled: int = Field(default=0, ge=0)
    entries: int = Field(default=4, ge=0)

    @property
    def parts(self) -> int:
        """How many parts a round is written in."""
        return -(-self.sessions // self.sessions_per_part)

    @model_validator(mode="after")
    def _records_something(self) -> Self:
        if self.asks + self.calm == 0:
            raise ValueError("asks and calm must not both be 0")
        if min(self.tokens) < 4 * self.horizon:
            raise ValueError(
                f"tokens has a text of {min(self.tokens)}, too short to stop in its second half "
                f"with a horizon of {self.horizon} tokens; expected at least {4 * self.horizon}"
            )
        return self


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the focus is looked at: what is read behind the history, asked, and to come.

    ``evidence`` are the blocks that are known to tell what comes, ``None`` where that is not known;
    of ``related`` ones it is not clear. So many of the newest pending
    tokens were ``written`` in answer already.
    """

    pending: Tensor
    query: Tensor
    future: Tensor
    evidence: tuple[int, ...] | None = None
    related: tuple[int, ...] = ()
    written: int = 0


class LensRecorder:
    """Plays sessions with a lens and labels its snapshots.

    Args:
        base: the frozen base model.
        gistnet: makes the gists.
        lens: whose proposals and trajectory are recorded.
        texts: draws the histories.
        engine: budget and habits of the sessions.
        config: how much.
    """

    def __init__(
        self,
        base: BaseModel,
        gistnet: GistNet,
        lens: LensNet,
        texts: LensTexts,
        engine: EngineConfig,
        config: RecordConfig,
    ) -> None:
        self.base = base
        self.gistnet = gistnet
        self.lens = lens
        self.texts = texts
        self.engine = engine
        self.config = config
        self.policy = LensPolicy(lens, proposals=config.proposals, reads=None)

    def check(self) -> None:
        """Opens a session without any text.

        Raises:
            ConfigError, CheckpointError: models, budget and habits do not fit together.
        """
        with self._engine():
            pass

    def session(self, number: int) -> Iterator[Snapshot]:
        """The snapshots of session ``number``, a function of the seed, the number and the lens."""
        config = self.config
        rng = random.Random(f"lens sessions/{self.texts.seed}/{number}")
        length = rng.choice(config.tokens)
        # Texts 0, 1, … are those that the keys were trained on: there they find more than later.
        text = self.texts.draw(-1 - number, length, rng.randint(2, 2 * config.facts))
        with self._engine() as engine:
            yield from self._play(engine, text, rng)

    @contextmanager
    def _engine(self) -> Generator[Engine, None, None]:
        """An engine over an empty memory, which ends with it."""
        identity = Engine.identity(self.base, self.gistnet, self.lens)
        with (
            tempfile.TemporaryDirectory() as folder,
            Memory.create(Path(folder) / "session.mctx", identity) as memory,
        ):
            yield Engine(
                self.base, memory, gistnet=self.gistnet, lens=self.lens, policy=self.policy,
                config=self.engine,
            )  # fmt: skip

    def _play(self, engine: Engine, text: AskedText, rng: random.Random) -> Iterator[Snapshot]:
        config, done = self.config, 0
        stops = sorted(
            rng.randrange(len(text.tokens) // 2, len(text.tokens) - config.horizon)
            for _ in range(config.calm)
        )
        nothing = torch.empty(0, dtype=torch.int64)
        for stop in stops:
            engine.ingestor.ingest_tokens(text.tokens[done:stop])
            done = stop
            engine.focus.advance(done)
            query = text.tokens[max(0, done - self.engine.query_tokens) : done]
            future = text.tokens[done : done + config.horizon]
            yield from self._look(engine, _Place(nothing, query, future), rng)
        engine.ingestor.ingest_tokens(text.tokens[done:])
        engine.focus.advance(len(text.tokens))
        asks = list(text.asks)
        for ask in rng.sample(asks, min(config.asks, len(asks))):
            mark = engine.focus.mark()
            engine.focus.start_over()
            if ask.noted:
                # What was noted was found at an earlier look, and is open still.
                self._refocus(engine, self._asked(replace(ask, noted="")))
            yield from self._look(engine, self._asked(ask), rng)
            engine.focus.return_to(mark)

    def _asked(self, ask: Ask) -> _Place:
        query = self.base.encode(ask.query)[-self.engine.query_tokens :]
        pending = self.base.encode(ask.prompt)
        return _Place(
            pending,
            query,
            self.base.encode(ask.target),
            ask.evidence,
            ask.related,
            # As in a session, where the answer is written behind the prompt, token by token.
            len(pending) - len(self.base.encode(replace(ask, noted="").prompt)),
        )

    def _look(self, engine: Engine, place: _Place, rng: random.Random) -> Iterator[Snapshot]:
        """Records rounds of refocus, each from where the lens's own plan has led."""
        for _ in range(self.config.rounds):
            view = engine.focus.view(place.pending, query=place.query, written=place.written)
            if len(view.context):
                yield self._snapshot(view, place, rng)
            if not self._refocus(engine, place):
                return

    def _refocus(self, engine: Engine, place: _Place) -> bool:
        """One round of what the lens wants; whether it edited anything."""
        reserve = len(place.pending) + len(place.future)
        plan = engine.focus.refocus(
            place.pending, query=place.query, written=place.written, reserve=reserve
        )
        return bool(plan.edits)

    @torch.inference_mode()
    def _snapshot(self, view: FocusView, place: _Place, rng: random.Random) -> Snapshot:
        inputs = self.policy.inputs(view)
        context = view.context
        worth = Counterfactual(view, place.future)
        movable = (context.legal_expand | context.legal_collapse).nonzero()[:, 0].tolist()
        chosen = torch.tensor(
            sorted(rng.sample(movable, min(self.config.entries, len(movable)))), dtype=torch.int64
        )
        entry_utility = torch.full((len(context),), torch.nan)
        entry_utility[chosen] = worth.entries(chosen)
        scores = self.lens(inputs.entries, inputs.cache, inputs.tail).cache[0]
        labelled = self._labelled(inputs.blocks, scores, place, rng)
        cache_utility = torch.full((len(inputs.blocks),), torch.nan)
        cache_utility[labelled] = worth.blocks(inputs.blocks[labelled])
        return Snapshot(
            entry_levels=context.levels.clone(),
            entry_starts=context.starts.clone(),
            entry_vectors=inputs.entries.vectors[0].half(),
            entry_features=inputs.entries.features[0],
            entry_can_expand=inputs.entries.can_expand[0],
            entry_can_collapse=inputs.entries.can_collapse[0],
            entry_utility=entry_utility,
            cache_levels=torch.zeros_like(inputs.blocks),
            cache_starts=inputs.blocks * context.block_size,
            cache_vectors=inputs.cache.vectors[0].half(),
            cache_features=inputs.cache.features[0],
            cache_utility=cache_utility,
            cache_evidence=self._evidence(view, inputs.blocks, place),
            tail_hidden=inputs.tail.hidden[0].half(),
            cursor=torch.tensor(context.cursor),
            tail_start=torch.tensor(context.tail_start),
        )

    def _evidence(self, view: FocusView, blocks: Tensor, place: _Place) -> Tensor:
        """Which blocks are known to tell what comes, ``[m]``; see :class:`Snapshot`."""
        if place.evidence is None:
            return torch.full((len(blocks),), torch.nan)
        tells = torch.isin(blocks, torch.tensor(place.evidence, dtype=torch.int64))
        unclear = torch.isin(blocks, torch.tensor(place.related, dtype=torch.int64))
        # What is raw already may have told what was noted.
        entries = view.context.indices_of(blocks * view.context.block_size)
        unclear |= view.context.levels[entries] == 0
        return tells.float().masked_fill(unclear & ~tells, torch.nan)

    def _labelled(
        self, blocks: Tensor, scores: Tensor, place: _Place, rng: random.Random
    ) -> Tensor:
        """Indices ``[l]`` of the proposals to measure, ascending."""
        most = self.config.labelled
        if not most or len(blocks) <= most:
            return torch.arange(len(blocks))
        telling = torch.isin(blocks, torch.tensor(place.evidence or (), dtype=torch.int64))
        first = telling.nonzero()[:, 0].tolist()[:most]
        others = (~telling).nonzero()[:, 0].tolist()
        if len(first) < most:
            first.append(others.pop(int(scores[~telling].argmax())))
        return torch.tensor(sorted((*first, *rng.sample(others, most - len(first)))))
