"""KV compression by NVIDIA's kvpress: what was read stays as pruned keys and values."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from megacontext.errors import ConfigError, InputError, ModelError
from megacontext.evaluation.baselines.extras import import_extra
from megacontext.evaluation.baselines.rival import Span
from megacontext.memory import Memory
from megacontext.runtime import kv_cache
from megacontext.runtime.architectures import attention_modules
from megacontext.runtime.base_model import BaseModel, Prefill
from megacontext.runtime.kv_cache import ContextCache
from megacontext.runtime.plain_decode import decode_plain
from megacontext.runtime.sampling import TokenSampler

PressName = Literal["snapkv", "expected_attention", "streaming_llm", "knorm"]
PRESSES: tuple[PressName, ...] = get_args(PressName)

_CLASSES: dict[PressName, str] = {
    "snapkv": "SnapKVPress",
    "expected_attention": "ExpectedAttentionPress",
    "streaming_llm": "StreamingLLMPress",
    "knorm": "KnormPress",
}
# Room for prompt and answer in whole steps: questions of like length share one compressed history.
_STEP = 64
# What SnapKV observes; no press is asked to keep or to read less.
_LEAST = 64


class KVCompression:
    """Reads the history before it knows the question, and keeps ``W`` entries a head at most.

    Four presses run: SnapKV (arXiv 2404.14469), Expected Attention (2510.00636), StreamingLLM
    (2309.17453) and Knorm (2406.11430). What they keep is decided by kvpress; the hook that calls
    them is ours, because the hook of kvpress asks for an argument (``cache_position``) that
    transformers gives its attention no longer since 5.3. Presses which observe the attention
    itself need the ``eager`` implementation, and those that prune heads unevenly need attention
    functions replaced for the whole process; neither is done to a base that all rivals share.

    A history that, with prompt and answer, fits the positions of the base is read at once and then
    pruned, as kvpress does; positions go on behind it. A longer one is read in chunks, each behind
    what was kept so far, and pruned after each: ``KeyRerotationPress`` then moves the keys that are
    kept to positions without gaps, so that they stay within what the base was trained for. This is
    refused for Expected Attention, which takes the chunk's length for the position of the queries
    to come, and for models on which that rotation is not exact (measured, not assumed). While it
    reads, the cache exceeds the budget by a chunk, or by the history.

    Every head keeps other tokens, so no span counts as raw, unless all was kept.

    Args:
        press: which of them.
        base: the frozen base model.
        memory: where the tokens lie.
        budget: most entries of a head together with prompt and answer.
        chunk_tokens: tokens read between two prunings of a long history; fewer where the base
            has too few positions beyond the budget.

    Raises:
        ConfigError: the extra ``kvpress`` is not installed, or the base has fewer positions than
            the budget.
        ModelError: kvpress cannot prune the keys of this architecture.
    """

    def __init__(
        self,
        press: PressName,
        base: BaseModel,
        memory: Memory,
        budget: int,
        chunk_tokens: int = 256,
    ) -> None:
        self.name = f"kvpress.{press}"
        if budget > base.max_positions:
            raise ConfigError(
                f"budget {budget} is more than the {base.max_positions} positions of {base.name}; "
                "lower it"
            )
        self.press: PressName = press
        self.base = base
        self.memory = memory
        self.budget = budget
        self.chunk_tokens = chunk_tokens
        self.raw_spans: list[Span] = []
        self._kvpress = _import_kvpress(self.name)
        self._modules: list[Any] = attention_modules(base.model, base.n_layers, base.name)
        if base.architecture.has_sliding_layers or not hasattr(self._modules[0], "q_proj"):
            raise ModelError(
                f"{self.name}: kvpress cannot prune {base.config.model_type} (it needs q_proj in "
                "every attention and no sliding layers); leave this rival out"
            )
        self._read_for: tuple[int, int, bool] | None = None
        self._read: ContextCache | None = None
        # Kept entries and chunk, how many chunks behind the kept ones, and the entries.
        self._chunks: tuple[tuple[int, int], int, Any] | None = None

    def answer(self, prompt: str, question: str, *, max_new_tokens: int, stop: str = "\n") -> str:
        """The answer to a prompt after the whole compressed history, up to ``stop``."""
        pending = self.base.encode(prompt)
        if not len(pending):
            raise InputError("the prompt is empty; ask something")
        cache = self._history(self.memory.n_tokens, len(pending) + max_new_tokens)
        logits = self._step(pending, cache, keep=1)
        tokens = decode_plain(
            self.base,
            Prefill(logits, cache),
            pending,
            TokenSampler(self.base.generation_config),
            max_new_tokens=max_new_tokens,
            stop=stop,
        )
        return "".join(token.text for token in tokens)

    def nll(self, cursor: int, targets: Tensor) -> Tensor:
        """NLL in nats, ``[h]`` float32, of the tokens that follow ``cursor``."""
        if cursor < 1:
            raise InputError("a context without rows predicts nothing; keep at least one raw token")
        # The newest token is read from the pruned cache: pruning must cost the first target, too.
        newest = self.memory.tokens(cursor - 1, cursor).long()
        cache = self._history(cursor - 1, 1 + len(targets))
        logits = self._step(torch.cat((newest, targets[:-1])), cache, keep=None)
        likelihood = torch.log_softmax(logits.float(), dim=-1)
        return -likelihood.gather(-1, targets.to(logits.device)[:, None])[:, 0]

    def _step(self, ids: Tensor, cache: ContextCache, keep: int | None) -> Tensor:
        after = int(cache.positions[-1]) + 1 if cache.n_rows else 0
        positions = torch.arange(after, after + len(ids), device=self.base.device)
        return self.base.step(ids, positions, cache, keep=keep)

    def _history(self, stop: int, ahead: int) -> ContextCache:
        """``history[:stop]`` with room for ``ahead`` tokens: a cache of the caller's own."""
        room = -(-ahead // _STEP) * _STEP
        kept = self.budget - room
        whole = stop + room <= self.base.max_positions
        if kept <= _LEAST:
            raise InputError(
                f"{self.name}: {ahead} tokens of prompt and answer leave {kept} of a budget of "
                f"{self.budget}, fewer than a press works with; shorten them or raise the budget"
            )
        key = (stop, kept, whole)
        if self._read is None or self._read_for != key:
            self._read = self._read_at_once(stop, kept) if whole else self._stream(stop, kept)
            self._read_for = key
        self.raw_spans = [(0, stop)] if 0 < stop <= kept else []
        return kv_cache.crop(self._read, self._read.n_rows)

    def _read_at_once(self, stop: int, kept: int) -> ContextCache:
        entries = kv_cache.new_entries()
        if stop:
            self._extend(entries, self.memory.tokens(0, stop).long(), 0, kept, moved=False)
        return self._as_cache(torch.arange(stop)[-kept:], entries)

    def _stream(self, stop: int, kept: int) -> ContextCache:
        """Chunk after chunk, from where the last stream of this kind stopped if it may go on."""
        # What is left at the end is read with the chunk before it: a press needs some tokens.
        chunk = min(self.chunk_tokens, (self.base.max_positions - kept) // 2)
        self._require_stream(chunk)
        whole = (stop - kept) // chunk - 1
        if whole < 0:
            entries, start = kv_cache.new_entries(), 0
        else:
            entries, start = self._after_chunks(kept, chunk, whole), kept + whole * chunk
        ids = self.memory.tokens(start, stop).long()
        self._extend(entries, ids, min(start, kept), kept, moved=True)
        return self._as_cache(torch.arange(kept), entries)

    def _after_chunks(self, kept: int, chunk: int, count: int) -> Any:
        """Entries of the first ``kept + count * chunk`` tokens, pruned; the caller's own."""
        if self._chunks is None or self._chunks[0] != (kept, chunk) or self._chunks[1] > count:
            entries = kv_cache.new_entries()
            self._extend(entries, self.memory.tokens(0, kept).long(), 0, kept, moved=True)
            self._chunks = ((kept, chunk), 0, entries)
        sizes, done, entries = self._chunks
        for number in range(done, count):
            start = kept + number * chunk
            ids = self.memory.tokens(start, start + chunk).long()
            self._extend(entries, ids, kept, kept, moved=True)
        self._chunks = (sizes, count, entries)
        return kv_cache.fork_entries(entries)

    def _require_stream(self, chunk: int) -> None:
        if self.press == "expected_attention":
            raise InputError(
                f"{self.name} is not applicable: the history is longer than the "
                f"{self.base.max_positions} positions of {self.base.name}, and this press cannot "
                "go on where it left off"
            )
        if chunk <= _LEAST:
            raise InputError(
                f"{self.name}: {chunk} tokens a chunk are fewer than a press works with; raise "
                "chunk_tokens, or lower the budget"
            )
        if not self._moves_exactly():
            raise InputError(
                f"{self.name} is not applicable: the history is longer than the "
                f"{self.base.max_positions} positions of {self.base.name}, whose keys kvpress "
                "cannot move to other positions"
            )

    @torch.inference_mode()
    def _extend(self, entries: Any, ids: Tensor, start: int, kept: int, *, moved: bool) -> None:
        """Reads tokens at positions from ``start`` on, then prunes every head to ``kept``."""
        total = start + len(ids)
        # kvpress cuts to the integer below total * (1 - ratio).
        ratio = max(0.0, 1.0 - (kept + 0.5) / total)
        press = getattr(self._kvpress, _CLASSES[self.press])(compression_ratio=ratio)
        if moved:
            press = self._kvpress.KeyRerotationPress(press)

        def prune(module: Any, _inputs: Any, given: dict[str, Any], _output: Any) -> None:
            layer = entries.layers[module.layer_idx]
            layer.keys, layer.values = press.compress(
                module, given["hidden_states"], layer.keys, layer.values, None, given
            )

        positions = torch.arange(start, total)
        with self._with_rotary():
            hooks = [m.register_forward_hook(prune, with_kwargs=True) for m in self._modules]
            try:
                embeddings = self.base.embed(ids)
                self.base.forward_rows(embeddings[None], positions[None], entries, None, 1)
            finally:
                for hook in hooks:
                    hook.remove()

    def _as_cache(self, positions: Tensor, entries: Any) -> ContextCache:
        none = torch.empty(0, dtype=torch.int64, device=self.base.device)
        return ContextCache(entries, none, positions.to(self.base.device))

    @torch.inference_mode()
    def _moves_exactly(self) -> bool:
        """Whether kvpress rotates kept keys to where the base itself would have put them."""
        base, kept = self.base, torch.tensor([1, 2, 5, 7], device=self.base.device)
        shape = (base.n_layers, 8, base.n_kv_heads, base.head_dim)
        size = torch.tensor(shape).prod()
        keys = torch.sin(torch.arange(1.0, float(size) + 1)).reshape(shape)
        keys = keys.to(base.device, base.dtype)
        there = base.rotation.rotate(keys, torch.arange(8, device=base.device))
        right = base.rotation.rotate(keys[:, kept], torch.arange(4, device=base.device))
        tolerance = 1e-3 if base.dtype == torch.float32 else 5e-2
        indices = kept.expand(1, base.n_kv_heads, 4)
        move = self._kvpress.KeyRerotationPress.rerotate_keys
        with self._with_rotary():
            return all(
                torch.allclose(
                    move(module, indices, there[layer].transpose(0, 1)[None])[0].transpose(0, 1),
                    right[layer],
                    atol=tolerance,
                )
                for layer, module in enumerate(self._modules)
            )

    @contextmanager
    def _with_rotary(self) -> Generator[None]:
        """Presses look for the rotary embedding at each attention, where models have it no more."""
        added = [module for module in self._modules if not hasattr(module, "rotary_emb")]
        for module in added:
            module.rotary_emb = self.base.model.get_decoder().rotary_emb
        try:
            yield
        finally:
            for module in added:
                del module.rotary_emb


def _import_kvpress(rival: str) -> Any:
    """The package, without the wrappers which it puts around all attention functions.

    They serve presses that are not used here, and would run for every other rival as well.
    """
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        return import_extra("kvpress", rival=rival, extra="kvpress")
    finally:
        for name, function in before.items():
            ALL_ATTENTION_FUNCTIONS[name] = function
