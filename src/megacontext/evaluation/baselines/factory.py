"""Makes rivals by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from megacontext.errors import ConfigError
from megacontext.evaluation.baselines.bm25 import BM25Retrieval
from megacontext.evaluation.baselines.config import RivalsConfig
from megacontext.evaluation.baselines.dense import DenseRetrieval
from megacontext.evaluation.baselines.engine_rival import EngineRival
from megacontext.evaluation.baselines.focus_only import FocusOnly
from megacontext.evaluation.baselines.full_context import FullContext
from megacontext.evaluation.baselines.gists_only import GistsOnly
from megacontext.evaluation.baselines.infllm import InfLLMRetrieval
from megacontext.evaluation.baselines.kv_compression import PRESSES, KVCompression, PressName
from megacontext.evaluation.baselines.oracle import OracleFocus
from megacontext.evaluation.baselines.own_keys import OwnKeysRetrieval
from megacontext.evaluation.baselines.rival import Rival
from megacontext.evaluation.baselines.sink_window import SinkWindow
from megacontext.evaluation.baselines.sliding_window import SlidingWindow
from megacontext.gistnet import GistNet
from megacontext.lensnet import LensNet
from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import Engine
from megacontext.runtime.focus_policies import (
    FocusPolicy,
    RecencyPolicy,
)
from megacontext.runtime.policy_names import PolicyName, make_policy


@dataclass(frozen=True)
class _Parts:
    base: BaseModel
    memory: Memory
    gistnet: GistNet | None
    lens: LensNet | None
    config: RivalsConfig

    @property
    def budget(self) -> int:
        return self.config.engine.budget

    @property
    def habits(self) -> dict[str, Any]:
        """Of rivals that retrieve blocks."""
        return {
            "recent_share": self.config.recent_share,
            "neighbours": self.config.neighbours,
            "query_tokens": self.config.engine.query_tokens,
        }

    @property
    def few(self) -> dict[str, Any]:
        """The same of those that read little of what they found."""
        config = self.config
        return self.habits | {
            "most_hits": config.few_hits,
            "most_recent": config.few_recent_tokens,
        }

    def engine(self, policy: FocusPolicy) -> Engine:
        return Engine(
            self.base,
            self.memory,
            gistnet=self.gistnet,
            policy=policy,
            lens=self.lens,
            config=self.config.engine,
        )


def _full(parts: _Parts) -> Rival:
    return FullContext(parts.base, parts.memory)


def _window(parts: _Parts) -> Rival:
    return SlidingWindow(parts.base, parts.memory, parts.budget)


def _sink_window(parts: _Parts) -> Rival:
    return SinkWindow(parts.base, parts.memory, parts.budget, parts.config.sink_tokens)


def _bm25(parts: _Parts) -> Rival:
    return BM25Retrieval(parts.base, parts.memory, parts.budget, **parts.habits)


def _dense(parts: _Parts) -> Rival:
    return DenseRetrieval(parts.base, parts.memory, parts.budget, **parts.habits)


def _bm25_few(parts: _Parts) -> Rival:
    return BM25Retrieval(parts.base, parts.memory, parts.budget, name="bm25_few", **parts.few)


def _dense_few(parts: _Parts) -> Rival:
    return DenseRetrieval(parts.base, parts.memory, parts.budget, name="dense_few", **parts.few)


def _own_keys(parts: _Parts) -> Rival:
    layers = parts.config.key_layers
    return OwnKeysRetrieval(parts.base, parts.memory, parts.budget, layers=layers, **parts.habits)


def _infllm(parts: _Parts) -> Rival:
    return InfLLMRetrieval(
        parts.base,
        parts.memory,
        parts.budget,
        layers=parts.config.key_layers,
        key_tokens=parts.config.key_tokens,
        **parts.habits,
    )


def _kvpress(press: PressName, parts: _Parts) -> Rival:
    chunk = parts.config.chunk_tokens
    return KVCompression(press, parts.base, parts.memory, parts.budget, chunk)


def _gists_only(parts: _Parts) -> Rival:
    return GistsOnly(parts.engine(RecencyPolicy()))


def _focus_only(parts: _Parts) -> Rival:
    engine = parts.engine(make_policy(parts.config.policy, parts.lens))
    return FocusOnly(engine, look_again=parts.config.look_again)


def _oracle(parts: _Parts) -> Rival:
    return OracleFocus(parts.engine(RecencyPolicy()))


def _megacontext(policy: PolicyName | None, parts: _Parts) -> Rival:
    name = "megacontext" if policy is None else f"megacontext.{policy}"
    engine = parts.engine(make_policy(policy or parts.config.policy, parts.lens))
    return EngineRival(name, engine, look_again=parts.config.look_again)


_POLICIES: tuple[PolicyName, ...] = (
    "recency",
    "lexical",
    "likelihood",
    "attention",
    "lens",
)
_MAKERS: dict[str, Callable[[_Parts], Rival]] = {
    "full": _full,
    "window": _window,
    "sink_window": _sink_window,
    "bm25": _bm25,
    "bm25_few": _bm25_few,
    "dense": _dense,
    "dense_few": _dense_few,
    "own_keys": _own_keys,
    "infllm": _infllm,
    **{f"kvpress.{press}": partial(_kvpress, press) for press in PRESSES},
    "gists_only": _gists_only,
    "focus_only": _focus_only,
    "oracle": _oracle,
    "megacontext": partial(_megacontext, None),
    **{f"megacontext.{policy}": partial(_megacontext, policy) for policy in _POLICIES},
}
RIVALS: tuple[str, ...] = tuple(_MAKERS)
"""Every rival's name, in the order of tables."""

_GROUPS = {"kvpress": tuple(name for name in RIVALS if name.startswith("kvpress."))}


def rivals(
    names: Sequence[str],
    base: BaseModel,
    memory: Memory,
    gistnet: GistNet | None = None,
    lens: LensNet | None = None,
    config: RivalsConfig | None = None,
) -> list[Rival]:
    """Makes rivals over one memory, in the order of their names.

    Args:
        names: of :data:`RIVALS`; ``kvpress`` stands for all its presses.
        base: the frozen base model of all of them.
        memory: the history; open for reading is enough. It may grow afterwards.
        gistnet: the memory's compressor; the mean of a span's embeddings by default.
        lens: the memory's, if it stores lens keys; policy ``lens`` needs one.
        config: budget and habits.

    Raises:
        ConfigError: a name is unknown, a rival's optional extra is not installed, or a size does
            not fit the base.
        ModelError: a rival cannot run on this architecture.
        MemoryMismatchError: the memory was made with other models.
    """
    wanted = [one for name in names for one in _GROUPS.get(name, (name,))]
    unknown = [name for name in wanted if name not in _MAKERS]
    if unknown:
        raise ConfigError(f"unknown rival {unknown[0]!r}; known are {', '.join(RIVALS)}")
    parts = _Parts(base, memory, gistnet, lens, config or RivalsConfig())
    return [_MAKERS[name](parts) for name in wanted]
