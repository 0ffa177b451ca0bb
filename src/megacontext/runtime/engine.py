"""The engine: ingests text, keeps the focus moving, and decodes with the frozen base model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megacontext.config import FrozenConfig
from megacontext.errors import (
    ConfigError,
    InputError,
    MemoryMismatchError,
    ReadOnlyMemoryError,
)
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet
from megacontext.memory import Memory, MemoryIdentity, Source
from megacontext.runtime.answer import Answer, DecodedToken, Looks
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.companions import require_fit
from megacontext.runtime.context_reader import ContextReader
from megacontext.runtime.focus_allocator import AllocatorConfig, FocusAllocator
from megacontext.runtime.focus_loop import FocusLoop, FocusRecord
from megacontext.runtime.focus_policies import FocusPolicy, LexicalPolicy
from megacontext.runtime.focus_scores import FocusPlan
from megacontext.runtime.gist_builder import GistBuilder
from megacontext.runtime.ingest import Ingested, Ingestor, Progress
from megacontext.runtime.reading import KVMode, Reading, new_reading, require_rotation
from megacontext.runtime.sampling import TokenSampler
from megacontext.runtime.working_context import PositionPolicy, WorkingContext
from megacontext.telemetry import Telemetry

_STREAM_BLOCKS = 32


class EngineConfig(FrozenConfig):
    """Sizes and habits of one session.

    Attributes:
        budget: ``W``, the most token-equivalents that context, prompt and answer cost together.
        tail_tokens: newest tokens that are always raw.
        asked_tail_tokens: the same while a question is answered that is not remembered, if that is
            less: what came last is no likelier to tell than anything else, and stands in between.
        gist_slots: ``S``, entries that a gist is read as and costs; by default all that the GistNet
            gives. Fewer leave room for more spans, each read less exactly.
        positions: in which order what is read stands; see :meth:`WorkingContext.positions`.
        kv: what an edit costs while an answer is written. ``exact``: everything from the first
            edited entry on is computed again. ``incremental``: unedited entries keep their keys
            and values; only what was inserted is computed, and what asks (``query_tokens``).
        kv_halo: rows behind every inserted one that ``incremental`` computes again, too.
        query_tokens: how many of the newest tokens ask, where there is no prompt.
        refocus_rounds: most rounds before an answer; fewer when a round edits nothing.
        chunk_tokens: most tokens per commit while ingesting.
        keep_records: refocus records kept for ``explain``.
        allocator: thresholds of the allocator.
    """

    budget: int = Field(default=1024, ge=64)
    tail_tokens: int = Field(default=256, ge=0)
    asked_tail_tokens: int = Field(default=64, ge=0)
    gist_slots: int | None = Field(default=None, ge=1)
    positions: PositionPolicy = "gists_first"
    kv: KVMode = "exact"
    kv_halo: int = Field(default=0, ge=0)
    query_tokens: int = Field(default=64, ge=1)
    refocus_rounds: int = Field(default=4, ge=1, le=16)
    chunk_tokens: int = Field(default=16_384, ge=32)
    keep_records: int = Field(default=8_192, ge=1)
    allocator: AllocatorConfig = AllocatorConfig()

    @model_validator(mode="after")
    def _room_beside_the_tail(self) -> Self:
        if self.tail_tokens >= self.budget:
            raise ValueError(
                f"tail_tokens is {self.tail_tokens}, expected less than budget ({self.budget})"
            )
        return self


@dataclass(frozen=True)
class Explanation:
    """Why a span was in context when a token was written.

    Attributes:
        token: the token asked about.
        record: the refocus in force: entries, proposals and edits.
    """

    token: DecodedToken
    record: FocusRecord


@dataclass(frozen=True)
class EngineState:
    """Where a session stands; ``entries`` counts working entries by level."""

    cursor: int
    budget: int
    cost: int
    entries: dict[int, int]
    rounds: int
    policy: str
    swap_rate: float
    residency: float
    utilization: float


class Engine:
    """A frozen base model with a memory.

    Args:
        base: the base model; never changed.
        memory: open for reading, or for writing to ingest and remember.
        gistnet: the memory's compressor; the mean of a span's embeddings by default.
        policy: what to focus on; BM25 by default, which needs no training.
        lens: makes the keys stored beside gists, where the memory has any.
        config: sizes and habits.
        telemetry: told of every step.

    Raises:
        MemoryMismatchError: the memory was made with other models.
        CheckpointError: the GistNet was made for another base model.
        ConfigError: the budget is too small for the history, or too large for the base; or there is
            no tail to decode from.
    """

    def __init__(
        self,
        base: BaseModel,
        memory: Memory,
        *,
        gistnet: GistNet | None = None,
        policy: FocusPolicy | None = None,
        lens: LensNet | None = None,
        config: EngineConfig | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.base = base
        self.memory = memory
        net = GistNet.untrained(base.d_model) if gistnet is None else gistnet
        self.gistnet = net.to(base.device)
        self.config = EngineConfig() if config is None else config
        self.telemetry = Telemetry() if telemetry is None else telemetry
        self._check_fit(lens)
        self.ingestor = Ingestor(
            base,
            GistBuilder(base, self.gistnet, lens),
            memory,
            self.telemetry,
            chunk_tokens=self.config.chunk_tokens,
        )
        reader = ContextReader(
            base,
            self.gistnet,
            memory,
            positions=self.config.positions,
            max_positions=base.max_positions,
        )
        self.reader = reader
        self.focus = FocusLoop(
            base,
            memory,
            reader,
            LexicalPolicy() if policy is None else policy,
            FocusAllocator(self.config.allocator),
            self.telemetry,
            budget=self.config.budget,
            tail_tokens=self.config.tail_tokens,
            gist_cost=self.config.gist_slots or self.gistnet.cost,
            query_tokens=self.config.query_tokens,
            keep_records=self.config.keep_records,
            asked_tail_tokens=self.config.asked_tail_tokens,
            kv=self.config.kv,
        )
        self._decoded: deque[DecodedToken] = deque(maxlen=self.config.keep_records)

    @staticmethod
    def identity(
        base: BaseModel, gistnet: GistNet | None = None, lens: LensNet | None = None
    ) -> MemoryIdentity:
        """What a memory for these models must be created with."""
        net = GistNet.untrained(base.d_model) if gistnet is None else gistnet
        return MemoryIdentity(
            base_model=base.name,
            tokenizer_hash=base.tokenizer_hash,
            gist_version=net.version if lens is None else f"{net.version}+{lens.version}",
            block_size=net.config.block_size,
            gist_width=net.config.gist_width,
            key_width=0 if lens is None else lens.config.key_width,
            gist_dtype="fp16",
        )

    @property
    def context(self) -> WorkingContext:
        """The working context now."""
        return self.focus.context

    def ingest(
        self,
        text: str | Iterable[str],
        source: Source | None = None,
        progress: Progress | None = None,
    ) -> Ingested:
        """Appends a text, or a stream of texts, to the memory and moves the cursor behind it.

        Args:
            text: any Unicode text.
            source: where it came from.
            progress: called with the number of tokens of every commit.

        Raises:
            MemoryStoreError: a commit failed; all commits before it stand.
            ConfigError: the history's coarsest tiling no longer fits into the budget.
        """
        try:
            return self.ingestor.ingest(text, source, progress)
        finally:
            # Also after a failure: the commits before it stand.
            self.focus.advance(self.memory.n_tokens)

    def stream(
        self, text: str | Iterable[str], source: Source | None = None
    ) -> Iterator[FocusRecord]:
        """Ingests a text and lets the focus follow it block by block, as if it were being read.

        Yields:
            The record of the refocus after every ``K`` tokens; the cursor then stands behind them.
        """
        size = self.memory.identity.block_size
        source_id = self.memory.begin_source(source) if source is not None else None
        nothing = torch.empty(0, dtype=torch.int64)
        # Commits of several blocks at a time; the cursor still moves block by block.
        try:
            for tokens in self.ingestor.token_chunks(text, _STREAM_BLOCKS * size):
                self.ingestor.append(tokens, source_id)
                cursor = self.focus.context.cursor // size * size + size
                while cursor <= self.memory.n_tokens:
                    self.focus.advance(cursor)
                    self.focus.refocus(nothing, reserve=self._ahead(), reason="stream")
                    yield self.focus.records[-1]
                    cursor += size
        finally:
            # Also where the caller stops listening: history is what the memory holds.
            self.focus.advance(self.memory.n_tokens)

    def refocus(self, query: str = "", *, reserve: int = 0) -> FocusPlan:
        """One round of score, allocate and new working context.

        Args:
            query: text to focus for; the newest tokens if empty.
            reserve: token-equivalents to keep free besides the query's own.

        Raises:
            ConfigError: the query does not fit beside the coarsest context.
        """
        pending = self.base.encode(query)
        return self.focus.refocus(pending, asking=len(pending), reserve=len(pending) + reserve)

    def generate(
        self,
        prompt: str = "",
        *,
        max_new_tokens: int = 256,
        stop: str = "",
        query: str = "",
        look_again: str = "",
        remember: bool = True,
        seed: int = 0,
        **sampling: Any,
    ) -> Iterator[DecodedToken]:
        """Decodes a continuation of history and prompt, token by token.

        Args:
            prompt: text that follows the history.
            max_new_tokens: most tokens to decode.
            stop: text at which to end (it is not part of the answer); none if empty. Tokens that
                may begin it are held back until that is known. Where it begins within a token,
                the token stays and only its text is cut.
            query: text to focus for; prompt and answer themselves if empty. Give the bare question
                where the prompt wraps it in words of its own. Unless remembered, such a question
                starts from the coarsest context: what was in detail before is not its concern.
            look_again: text, such as the end of a sentence, behind which the focus looks again, for
                query and answer so far: one note may lead to the next.
            remember: whether prompt and answer become part of the memory. If not, the focus
                returns to where it stood once the answer is complete.
            seed: of the sampler.
            sampling: overrides of the model's generation settings, such as ``temperature``.

        Raises:
            InputError: there is nothing to continue, or prompt and answer do not fit into the
                budget.
            ReadOnlyMemoryError: ``remember`` is asked of a memory open for reading.
        """
        sampler = TokenSampler(self.base.generation_config, seed, **sampling)
        self._check_request(max_new_tokens, remember=remember)
        started = time.perf_counter()
        # The memory may have grown otherwise: a reader's by refresh(), a writer's by append().
        self.focus.advance(self.memory.n_tokens)
        start = self.memory.n_tokens
        answer = Answer(self.base, self.base.encode(prompt), start, stop)
        n_prompt = len(answer.said)
        asked = self.base.encode(query) if query else None
        mark = self.focus.mark()
        if query and not remember:
            self.focus.start_over()
        try:
            looks = Looks(asked, look_again)
            for decoded in self._decode(answer, sampler, max_new_tokens, looks, remember=remember):
                self._decoded.append(decoded)
                yield decoded
        finally:
            self._report_decode(start + n_prompt, len(answer.released) - n_prompt, started)
            # Also where the caller stops listening: what was given out is remembered.
            if remember:
                self._commit(answer.released[self.memory.n_tokens - start :])
            elif self.context.cursor == start:
                self.focus.return_to(mark)

    def _check_request(self, max_new_tokens: int, *, remember: bool) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; decode at least one token")
        if remember and not self.memory.writable:
            raise ReadOnlyMemoryError(
                f"{self.memory.path.name}: open for reading only; open it with mode 'a', or pass "
                "remember=False"
            )

    def _decode(
        self,
        answer: Answer,
        sampler: TokenSampler,
        max_new_tokens: int,
        looks: Looks,
        *,
        remember: bool,
    ) -> Iterator[DecodedToken]:
        size, start = self.memory.identity.block_size, self.memory.n_tokens
        n_prompt = len(answer.said)
        reading = self.new_reading()
        again = False
        for count in range(max_new_tokens):
            if again or count % size == 0:
                if remember:
                    self._commit(answer.certain[self.memory.n_tokens - start :])
                pending = answer.said[self.memory.n_tokens - start :]
                rounds = self.config.refocus_rounds if again or not count else 1
                said = answer.said[n_prompt:]
                logits = self._focus_and_read(
                    reading, pending, len(answer.said), rounds, looks.behind(said), len(said)
                )
            else:
                logits = reading.step(answer.said[-1:])
            token = sampler.choose(logits, answer.said)
            if sampler.is_end(token):
                break
            yield from answer.push(token, self.focus.state.round)
            if answer.stopped:
                return
            again = looks.after(self.base, answer.said[n_prompt:])
        yield from answer.finish()

    def ask(self, prompt: str, **options: Any) -> str:
        """The whole answer of :meth:`generate`, without remembering prompt and answer."""
        options.setdefault("remember", False)
        return "".join(token.text for token in self.generate(prompt, **options))

    def explain(self, index: int) -> Explanation:
        """Why the entries were in context when the token at ``index`` was decoded.

        Args:
            index: :attr:`DecodedToken.index`.

        Raises:
            InputError: no token was decoded there in this session, or its record is too old.
        """
        token = next((t for t in reversed(self._decoded) if t.index == index), None)
        if token is None:
            raise InputError(f"token {index} was not decoded in this session")
        record = next((r for r in self.focus.records if r.round == token.round), None)
        if record is None:
            raise InputError(
                f"the record of refocus {token.round} is no longer kept; raise keep_records "
                f"(now {self.config.keep_records})"
            )
        return Explanation(token, record)

    def state(self) -> EngineState:
        """Where the session stands."""
        context, meter = self.context, self.focus.meter
        levels, counts = torch.unique(context.levels, return_counts=True)
        return EngineState(
            cursor=context.cursor,
            budget=context.budget,
            cost=context.cost,
            entries=dict(zip(levels.tolist(), counts.tolist(), strict=True)),
            rounds=self.focus.state.round,
            policy=self.focus.policy.name,
            swap_rate=meter.swap_rate,
            residency=meter.residency,
            utilization=meter.utilization,
        )

    def new_reading(self) -> Reading:
        """What an answer is decoded from: nothing is read yet; KV mode as configured."""
        config = self.config
        return new_reading(
            config.kv,
            self.base,
            self.reader,
            halo=config.kv_halo,
            query_tokens=config.query_tokens,
        )

    def _check_fit(self, lens: LensNet | None) -> None:
        """Refuses models, memory and sizes that do not belong together."""
        base, gists = self.base, self.gistnet.config
        if self.config.kv == "incremental":
            require_rotation(base)
        require_fit(self.gistnet, base)
        if (self.config.gist_slots or 1) > gists.slots:
            raise ConfigError(
                f"gist_slots is {self.config.gist_slots}, the GistNet's gists have {gists.slots} "
                "entries; lower it"
            )
        difference = self.memory.identity.explain_difference(
            self.identity(base, self.gistnet, lens)
        )
        if difference is not None:
            raise MemoryMismatchError(f"{self.memory.path.name}: {difference}")
        if self.config.budget > base.max_positions:
            raise ConfigError(
                f"budget {self.config.budget} is more than the {base.max_positions} positions of "
                f"{base.name}; lower it"
            )
        if gists.reader == "kv" and self.config.tail_tokens < 1:
            raise ConfigError(
                "tail_tokens is 0, but the kv reader decodes from a raw token; set it to 1 or more"
            )

    def _commit(self, tokens: Tensor) -> None:
        if len(tokens):
            self.ingestor.append(tokens)
        self.focus.advance(self.memory.n_tokens)

    def _ahead(self) -> int:
        """Token-equivalents to reserve so that, with the headroom, a whole block can follow."""
        return max(0, self.memory.identity.block_size - self.config.allocator.headroom)

    def _focus_and_read(
        self,
        reading: Reading,
        pending: Tensor,
        asking: int,
        rounds: int,
        query: Tensor | None,
        written: int,
    ) -> Tensor:
        """Refocuses, then reads what changed; logits ``[vocab]`` of what follows."""
        if self.context.cursor + len(pending) == 0:
            raise InputError("there is nothing to continue: the memory and the prompt are empty")
        reserve, context = len(pending) + self._ahead(), self.context
        room = self.config.budget - self.config.allocator.headroom - self._ahead()
        if context.coarsest_cost <= room < context.coarsest_cost + len(pending):
            raise InputError(
                f"{len(pending)} tokens of prompt and answer do not fit beside the coarsest "
                f"context ({context.coarsest_cost} of a budget of {self.config.budget}, of which "
                f"{self.config.budget - room} stay free for decoding); remember them "
                "(remember=True), shorten the prompt, or raise the budget"
            )
        for _ in range(rounds):
            plan = self.focus.refocus(
                pending,
                asking=asking,
                query=query,
                written=written,
                reserve=reserve,
                reason="decode",
                cached=reading.window,
            )
            if not any(edit.kind == "expand" for edit in plan.edits):
                break
        return reading.read(self.context, pending, asking=asking)

    def _report_decode(self, start: int, tokens: int, started: float) -> None:
        if self.telemetry.enabled:
            self.telemetry.decode(
                generation=self.memory.generation,
                start=start,
                tokens=tokens,
                cost=self.context.cost,
                ms=(time.perf_counter() - started) * 1000,
            )
