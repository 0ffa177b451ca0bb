"""The engine: ingests text, keeps the focus moving, and decodes with the frozen base model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
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
from megacontext.runtime.decoding import Decoding
from megacontext.runtime.engine_state import EngineState, Explanation
from megacontext.runtime.focus_allocator import AllocatorConfig, FocusAllocator
from megacontext.runtime.focus_loop import FocusLoop, FocusRecord
from megacontext.runtime.focus_policies import FocusPolicy, LexicalPolicy
from megacontext.runtime.focus_scores import FocusPlan
from megacontext.runtime.gist_builder import GistBuilder
from megacontext.runtime.ingest import Ingested, Ingestor, Progress
from megacontext.runtime.reading import KVChoice, KVMode, Reading, kv_mode, new_reading
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
            ``auto``: ``incremental``, or ``exact`` where the base's keys cannot be moved.
        kv_halo: rows behind every inserted one that ``incremental`` computes again, too.
        query_tokens: how many of the newest tokens ask, where there is no prompt.
        refocus_rounds: most rounds before an answer; fewer when a round opens nothing and has left
            nothing to read for the next.
        chunk_tokens: most tokens per commit while ingesting.
        keep_records: refocus records kept for ``explain``.
        allocator: thresholds of the allocator.
    """

    budget: int = Field(default=1024, ge=64)
    tail_tokens: int = Field(default=256, ge=0)
    asked_tail_tokens: int = Field(default=64, ge=0)
    gist_slots: int | None = Field(default=None, ge=1)
    positions: PositionPolicy = "gists_first"
    kv: KVChoice = "auto"
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
        self.kv: KVMode = kv_mode(self.config.kv, base)
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
            kv=self.kv,
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
        """One round of score, allocate and new working context; see :attr:`FocusPlan.more`.

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
                query and answer so far: one note may lead to the next. Until then what was found
                for a question holds, and looks every block only make room.
            remember: whether prompt and answer become part of the memory. If not, the focus
                returns to where it stood once the answer is complete.
            seed: of the sampler.
            sampling: overrides of the model's generation settings, such as ``temperature``.

        Raises:
            InputError: there is nothing to continue, or prompt and answer do not fit into the
                budget.
            ReadOnlyMemoryError: ``remember`` is asked of a memory open for reading.
        """
        decoding = self.begin(
            prompt,
            max_new_tokens=max_new_tokens,
            stop=stop,
            query=query,
            look_again=look_again,
            remember=remember,
            seed=seed,
            **sampling,
        )
        try:
            while not decoding.ended:
                logits = self.look(decoding) if decoding.due else decoding.step()
                yield from self.take(decoding, logits)
        finally:
            self.end(decoding)

    def begin(
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
    ) -> Decoding:
        """Begins an answer without decoding it; arguments and errors as :meth:`generate`.

        For each token then call :meth:`look` where the answer is due, else compute the logits
        behind its newest token, and :meth:`take` them; call :meth:`end` in any case.
        """
        sampler = TokenSampler(self.base.generation_config, seed, **sampling)
        self._check_request(max_new_tokens, remember=remember)
        started = time.perf_counter()
        # The memory may have grown otherwise: a reader's by refresh(), a writer's by append().
        self.focus.advance(self.memory.n_tokens)
        start = self.memory.n_tokens
        decoding = Decoding(
            self.base,
            Answer(self.base, self.base.encode(prompt), start, stop),
            self.new_reading(),
            sampler,
            Looks(self.base.encode(query) if query else None, look_again),
            max_new_tokens,
            self.memory.identity.block_size,
            start,
            remember,
            self.focus.mark(),
            started,
        )
        if query and not remember:
            self.focus.start_over()
        return decoding

    def look(self, decoding: Decoding) -> Tensor:
        """Lets the focus look again and reads what changed; logits ``[vocab]`` of what follows."""
        answer, said = decoding.answer, decoding.said
        if decoding.remember:
            self._commit(answer.certain[self.memory.n_tokens - decoding.start :])
        pending = answer.said[self.memory.n_tokens - decoding.start :]
        asking, query = len(answer.said), decoding.looks.behind(said)
        return self._focus_and_read(
            decoding.reading, pending, asking, decoding.fresh, query, len(said)
        )

    def take(self, decoding: Decoding, logits: Tensor) -> Iterator[DecodedToken]:
        """Chooses the next token by its logits ``[vocab]``; yields what belongs to the answer."""
        for decoded in decoding.take(logits, self.focus.state.round):
            self._decoded.append(decoded)
            yield decoded

    def end(self, decoding: Decoding) -> None:
        """Remembers what was given out, or returns the focus; the answer need not be complete."""
        self._report_decode(decoding)
        if decoding.remember:
            self._commit(decoding.answer.released[self.memory.n_tokens - decoding.start :])
        elif self.context.cursor == decoding.start:
            self.focus.return_to(decoding.mark)

    def _check_request(self, max_new_tokens: int, *, remember: bool) -> None:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens is {max_new_tokens}; decode at least one token")
        if remember and not self.memory.writable:
            raise ReadOnlyMemoryError(
                f"{self.memory.path.name}: open for reading only; open it with mode 'a', or pass "
                "remember=False"
            )

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
            kv=self.kv,
            swap_rate=meter.swap_rate,
            residency=meter.residency,
            utilization=meter.utilization,
        )

    def new_reading(self) -> Reading:
        """What an answer is decoded from: nothing is read yet; KV mode as configured."""
        config = self.config
        return new_reading(
            self.kv,
            self.base,
            self.reader,
            halo=config.kv_halo,
            query_tokens=config.query_tokens,
        )

    def _check_fit(self, lens: LensNet | None) -> None:
        """Refuses models, memory and sizes that do not belong together."""
        base, gists = self.base, self.gistnet.config
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
        fresh: bool,
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
        for _ in range(self.config.refocus_rounds if fresh else 1):
            plan = self.focus.refocus(
                pending,
                asking=asking,
                query=query,
                written=written,
                settled=not fresh,
                reserve=reserve,
                reason="decode",
                cached=reading.window,
            )
            if not plan.more:
                break
        return reading.read(self.context, pending, asking=asking)

    def _report_decode(self, decoding: Decoding) -> None:
        if self.telemetry.enabled:
            self.telemetry.decode(
                generation=self.memory.generation,
                start=decoding.start + decoding.n_prompt,
                tokens=len(decoding.answer.released) - decoding.n_prompt,
                cost=self.context.cost,
                ms=(time.perf_counter() - decoding.started) * 1000,
            )
