"""The frozen base model, as the rest of MegaContext sees it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from megacontext.errors import InputError
from megacontext.runtime import kv_cache
from megacontext.runtime.architectures import Architecture, read_architecture
from megacontext.runtime.attention_mass import mean_attention
from megacontext.runtime.context_input import ContextInput
from megacontext.runtime.kv_cache import ContextCache
from megacontext.runtime.model_loading import load_model
from megacontext.runtime.plain_reading import final_states
from megacontext.runtime.rotary import KeyRotation
from megacontext.runtime.teacher_forcing import target_nll
from megacontext.runtime.tokenization import (
    decode_ids,
    encode_text,
    hash_tokenizer,
    id_list,
)


@dataclass(frozen=True, eq=False)
class Prefill:
    """What reading a context gives.

    Attributes:
        logits: ``[kept rows, vocab]`` in the model's dtype; row i predicts what follows it.
        cache: the context's keys and values, ready for :meth:`BaseModel.step`.
        hidden: ``[computed rows, d_model]`` final hidden states, if asked for.
    """

    logits: Tensor
    cache: ContextCache
    hidden: Tensor | None = None


class BaseModel:
    """A frozen causal language model that reads raw tokens and gists.

    Args:
        model: a decoder-only ``transformers`` model with a language-modelling head. It is put in
            evaluation mode and its parameters are frozen; nothing else of it is changed.
        tokenizer: its tokenizer.
        name: what errors and memories call it.

    Raises:
        ModelError: the architecture or its attention implementation cannot be used.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.name = name
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.architecture: Architecture = read_architecture(model, name)
        self._parameter: Tensor = next(model.parameters())

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Loads a model from a local folder, a hub id, or the package (``bundled:NAME``).

        Code from the hub is never run.

        Raises:
            ModelNotFoundError: nothing lies under that name.
            CheckpointError: its weights are missing, damaged or incomplete.
            ModelError: it is no causal language model that MegaContext can drive.
            ConfigError: the dtype or device does not exist here.
        """
        model, tokenizer = load_model(name_or_path, dtype, device)
        return cls(model, tokenizer, str(name_or_path))

    @property
    def config(self) -> Any:
        """The model's Hugging Face configuration."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The model's own generation settings."""
        return self.model.generation_config

    @property
    def d_model(self) -> int:
        """Width of the input embeddings."""
        return self.architecture.d_model

    @property
    def n_layers(self) -> int:
        """Decoder layers."""
        return self.architecture.n_layers

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads per layer."""
        return self.architecture.n_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of a key."""
        return self.architecture.head_dim

    @property
    def value_dim(self) -> int:
        """Width of a value."""
        return self.architecture.value_dim

    @property
    def max_positions(self) -> int:
        """Positions the model was trained for."""
        return self.architecture.max_positions

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return self.architecture.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        # The model's own property walks over its parameters, at every call.
        return self._parameter.device

    @cached_property
    def tokenizer_hash(self) -> str:
        """16 hexadecimal digits that change with anything that changes token ids."""
        return hash_tokenizer(self.tokenizer)

    @cached_property
    def rotation(self) -> KeyRotation:
        """The model's key rotation; measured and proved on first use.

        Raises:
            ModelError: keys of this architecture cannot be supplied from outside.
        """
        return KeyRotation(self.model, self.architecture, self.name)

    def encode(self, text: str) -> Tensor:
        """Token ids of a text, without special tokens: ``[n]`` int64.

        Unpaired surrogates, which no encoding can hold, are read as U+FFFD.
        """
        return encode_text(self.tokenizer, text)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return decode_ids(self.tokenizer, ids)

    def decode_batch(self, blocks: Sequence[Sequence[int]]) -> list[str]:
        """The text of each of several sequences of token ids."""
        return self.tokenizer.batch_decode(
            blocks, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def token_texts(self, ids: Tensor | Sequence[int]) -> list[str]:
        """The text of each token by itself; bytes that are no whole character become U+FFFD."""
        return [self.decode([token]) for token in id_list(ids)]

    def embed(self, ids: Tensor) -> Tensor:
        """Input embeddings of tokens, scaled as the model's own embedding layer scales them.

        Args:
            ids: ``[..., n]`` int64.

        Returns:
            ``[..., n, d_model]`` in the model's dtype and device.

        Raises:
            InputError: an id lies outside the model's vocabulary.
        """
        ids = ids.to(self.device, torch.int64)
        if ids.numel() and bool(((ids < 0) | (ids >= self.vocab_size)).any()):
            raise InputError(
                f"{self.name}: token ids must lie in 0…{self.vocab_size - 1}; was the text "
                "tokenized for another model?"
            )
        with torch.inference_mode():
            vectors = self.model.get_input_embeddings()(ids)
        return vectors.clone()  # an ordinary tensor, usable in training

    def features(self, ids: Tensor) -> Tensor:
        """Final hidden states of a plain forward over tokens.

        Args:
            ids: ``[n]`` or ``[batch, n]`` int64.

        Returns:
            ``[n, d_model]`` or ``[batch, n, d_model]`` in the model's dtype.
        """
        embeddings = self.embed(ids).reshape(-1, ids.shape[-1], self.d_model)
        positions = torch.arange(ids.shape[-1], device=self.device)
        with torch.inference_mode():
            cache = kv_cache.empty_cache(self.device)
            output = self.model.get_decoder()(
                inputs_embeds=embeddings,
                position_ids=positions.expand(len(embeddings), -1),
                past_key_values=cache.entries,
                use_cache=True,
            )
        return output.last_hidden_state.clone().reshape(*ids.shape, self.d_model)

    @torch.inference_mode()
    def prefill(
        self,
        context: ContextInput,
        cache: ContextCache | None = None,
        *,
        keep: int | None = None,
        hidden_states: bool = False,
    ) -> Prefill:
        """Reads a context.

        Args:
            context: what to read.
            cache: holds the first rows of this very context already (see :meth:`resume`); only
                the rows after them are computed. It grows to the whole context.
            keep: compute the logits of the last ``keep`` computed rows only.
            hidden_states: return the computed rows' final hidden states as well.

        Raises:
            InputError: nothing is left to compute, a shape does not fit the model, or the cache
                is not one of this context.
            ModelError: the context has ``kv`` gists and the architecture takes none.
        """
        self._check(context)
        if cache is None:
            cache = self.gist_entries(context)
        start = cache.n_rows
        if cache.n_gists != context.n_gists or start >= context.n_rows:
            raise InputError(
                f"a cache of {cache.n_gists} gists and {start} rows is no beginning of a context "
                f"of {context.n_gists} gists and {context.n_rows} rows; use resume()"
            )
        return self._extend(
            context.embeddings[start:], context.positions[start:], cache, keep, hidden_states
        )

    @torch.inference_mode()
    def step(
        self, inputs: Tensor, positions: Tensor, cache: ContextCache, *, keep: int | None = None
    ) -> Tensor:
        """Reads more rows behind what ``cache`` holds; the cache grows by them.

        Args:
            inputs: token ids ``[m]`` int64, or input embeddings ``[m, d_model]``.
            positions: ``[m]`` int64.
            cache: from :meth:`prefill`.
            keep: compute the logits of the last ``keep`` rows only.

        Returns:
            Logits ``[m or keep, vocab]`` in the model's dtype.

        Raises:
            InputError: the shapes do not fit.
        """
        embeddings = inputs if inputs.is_floating_point() else self.embed(inputs)
        rows = ContextInput(embeddings, positions)
        self._check(rows)
        if rows.n_rows == 0:
            raise InputError("step needs at least one token")
        return self._extend(rows.embeddings, positions, cache, keep, False).logits

    @torch.inference_mode()
    def resume(self, cache: ContextCache, old: ContextInput, new: ContextInput) -> ContextCache:
        """The part of a cache that is still exact after the context was edited.

        Args:
            cache: holds at least the rows of ``old``.
            old: the context that ``cache`` was computed for.
            new: the context to read next.

        Returns:
            A cache of the gists of ``new`` and of its longest unchanged leading rows, but never
            of all rows, so that :meth:`prefill` has logits to give. ``cache`` is left as it was.
        """
        self._check(new)
        rows = max(0, min(kv_cache.common_prefix(old, new), cache.n_rows, new.n_rows - 1))
        if rows == 0:
            return self.gist_entries(new)
        kept = kv_cache.crop(cache, rows)
        if kv_cache.same_gists(old, new):
            return kept
        return kv_cache.replace_gists(kept, self.gist_entries(new))

    def nll(
        self, context: ContextInput, target_ids: Tensor, target_positions: Tensor | None = None
    ) -> Tensor:
        """Negative log-likelihood of the tokens that follow a context, teacher-forced.

        Args:
            context: at least one row; its last row predicts the first target.
            target_ids: ``[h]`` int64.
            target_positions: ``[h]`` int64; by default they follow the context's last row.

        Returns:
            ``[h]`` float32, in nats.
        """
        positions = None if target_positions is None else target_positions[None]
        return self.nll_batch([context], target_ids[None], positions)[0]

    def nll_batch(
        self,
        contexts: Sequence[ContextInput],
        target_ids: Tensor,
        target_positions: Tensor | None = None,
    ) -> Tensor:
        """:meth:`nll` of several contexts in one forward.

        Memory grows with ``b × (longest context)²`` where lengths differ or gists are present:
        batch contexts of similar length.

        Args:
            contexts: b contexts, of any lengths.
            target_ids: ``[b, h]`` int64.
            target_positions: ``[b, h]`` int64.

        Returns:
            ``[b, h]`` float32, in nats.

        Raises:
            InputError: there is no context or target, or a context has no row.
        """
        for context in contexts:
            self._check(context)
        with torch.inference_mode():
            nll = target_nll(self, contexts, target_ids, target_positions)
        return nll.clone()  # labels for training: an ordinary tensor

    def attention_to(self, context: ContextInput, query_rows: int) -> Tensor:
        """Where the last rows look: attention mass per entry.

        Args:
            context: what to read.
            query_rows: how many of the last rows ask.

        Returns:
            ``[gists + rows]`` float32, mean over layers, heads and asking rows (so it sums to 1):
            first the ``kv`` gists, then the rows, each oldest first.

        Raises:
            InputError: the context has fewer rows than ``query_rows``.
        """
        self._check(context)
        if not 1 <= query_rows <= context.n_rows:
            raise InputError(
                f"query_rows is {query_rows}; the context has {context.n_rows} rows to ask with"
            )
        with torch.inference_mode():
            mass = mean_attention(self, context, query_rows)
        return mass.clone()

    def gist_entries(self, context: ContextInput) -> ContextCache:
        """A cache with the context's ``kv`` gists, rotated to their positions, and no rows."""
        if context.n_gists == 0 or context.gists is None:
            return kv_cache.empty_cache(self.device)
        keys, values, positions = context.gists
        positions = positions.to(self.device)
        ends = [positions[-1:], context.positions[-1:].to(self.device)]
        keys = self.rotation.rotate(
            keys.to(self.device, self.dtype), positions, int(torch.cat(ends).max())
        )
        return kv_cache.gist_cache(keys, values.to(self.device, self.dtype), positions)

    def forward_rows(
        self,
        embeddings: Tensor,
        positions: Tensor,
        entries: Any,
        mask: Tensor | dict[str, Tensor] | None,
        keep: int | None,
    ) -> Any:
        """One forward of the base from embeddings; gradients flow unless disabled outside.

        Args:
            embeddings: ``[batch, rows, d_model]``.
            positions: ``[batch, rows]`` int64.
            entries: the Hugging Face cache to read and to extend.
            mask: from :func:`kv_cache.attention_mask`; ``None``: the model's own causal mask.
            keep: logits of the last ``keep`` rows only.

        Returns:
            The model's own output object.
        """
        return self.model(
            inputs_embeds=embeddings.to(self.device, self.dtype),
            position_ids=positions.to(self.device),
            past_key_values=entries,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=keep or 0,
            return_dict=True,
        )

    def mask_for(self, cache: ContextCache, n_queries: int) -> Tensor | dict[str, Tensor] | None:
        """The mask of the last rows of a cache; ``None`` where the model's own is right.

        Args:
            cache: its ``positions`` include the rows about to be computed.
            n_queries: how many those are.
        """
        if not self._needs_mask(cache, n_queries):
            return None
        return kv_cache.attention_mask(
            self.architecture,
            gist_positions=cache.gist_positions[None],
            positions=cache.positions[None],
            n_queries=n_queries,
            dtype=self.dtype,
        )

    def _needs_mask(self, cache: ContextCache, n_queries: int) -> bool:
        # The model masks by index: right for rows in order with every gist before them, and for
        # windows only if positions have no gaps.
        if self.architecture.has_sliding_layers:
            return cache.n_gists > 0 or bool((cache.positions.diff() != 1).any())
        if cache.n_gists == 0:
            return False
        return bool(cache.gist_positions[-1] >= cache.positions[-n_queries])

    def _extend(
        self,
        embeddings: Tensor,
        positions: Tensor,
        cache: ContextCache,
        keep: int | None,
        hidden_states: bool,
    ) -> Prefill:
        if keep is not None and keep < 1:
            raise InputError(f"keep is {keep}; keep at least one row of logits, or None for all")
        positions = positions.to(self.device)
        grown = ContextCache(
            kv_cache.fork_entries(cache.entries),
            cache.gist_positions,
            torch.cat([cache.positions, positions]),
        )
        mask = self.mask_for(grown, positions.shape[0])
        with final_states(self.model) if hidden_states else nullcontext([]) as caught:
            output = self.forward_rows(embeddings[None], positions[None], grown.entries, mask, keep)
        # Only now, so that a failed forward leaves the cache as it was.
        cache.entries, cache.positions = grown.entries, grown.positions
        return Prefill(output.logits[0], cache, caught[0][0] if caught else None)

    def _check(self, context: ContextInput) -> None:
        if context.embeddings.shape[1] != self.d_model:
            raise InputError(
                f"{self.name}: embeddings are {context.embeddings.shape[1]} wide, the model's "
                f"are {self.d_model}; were they made for another base model?"
            )
        if context.gists is None:
            return
        keys, values, _ = context.gists
        shapes = (self.n_layers, self.n_kv_heads, self.head_dim, self.value_dim)
        given = (keys.shape[0], *keys.shape[2:], values.shape[3])
        if given != shapes:
            raise InputError(
                f"{self.name}: gists have (layers, kv_heads, head_dim, value_dim) = {given}, the "
                f"model has {shapes}; was the GistNet made for another base model?"
            )
