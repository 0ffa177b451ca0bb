"""Small engines over random tiny models, and texts for them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tiny_models import tiny_base_model

from megacontext.gistnet import GistNet, GistNetConfig
from megacontext.memory import Memory
from megacontext.runtime.engine import Engine, EngineConfig

K = 32
_WORDS = ("amber", "birch", "cedar", "delta", "ember", "iris", "jade", "kelp", "lotus", "north")


def words(n_bytes: int, seed: int = 0) -> str:
    """Prose of common words, one token per byte."""
    draw = random.Random(seed)
    text = ""
    while len(text) < n_bytes:
        text += draw.choice(_WORDS) + " "
    return text[:n_bytes]


def config(**changes: Any) -> EngineConfig:
    """Budget 192 and a tail of one block, unless changed."""
    return EngineConfig.parse({"budget": 192, "tail_tokens": 32, "query_tokens": 32} | changes)


def new_engine(
    folder: Path, base: Any = None, *, name: str = "a", lens: Any = None, **options: Any
) -> Engine:
    """An engine over a new, empty memory."""
    base = tiny_base_model(max_positions=256) if base is None else base
    options.setdefault("config", config())
    identity = Engine.identity(base, options.get("gistnet"), lens)
    return Engine(base, Memory.create(folder / f"{name}.mctx", identity), lens=lens, **options)


def learned_gistnet(
    base: Any, *, reader: str = "kv", slots: int = 1, seed: int = 1, **changes: Any
) -> GistNet:
    """A transformer GistNet with random weights; its reader fits the base."""
    import torch

    own: dict[str, Any] = {}
    if reader == "kv":
        own = {
            "kv_layers": base.n_layers,
            "kv_heads": base.n_kv_heads,
            "kv_head_dim": base.head_dim,
        }
    net = GistNet(
        GistNetConfig.parse(
            {
                "kind": "transformer",
                "d_model": base.d_model,
                "reader": reader,
                "slots": slots,
                "n_layers": 1,
                "n_heads": 2,
                "context_tokens": 64,
                "init_seed": seed,
            }
            | own
            | changes
        )
    ).eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in net.parameters():  # also those that start at zero
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return net


def contents(memory: Memory) -> dict[str, Any]:
    """Everything that a memory holds, as plain values, bit by bit."""
    import torch

    levels = range(1, memory.n_levels)
    held: dict[str, Any] = {"tokens": memory.tokens().tolist()}
    for level in levels:
        held[f"gists {level}"] = memory.gists(level).view(torch.int16).tolist()
        held[f"fidelity {level}"] = memory.fidelity(level).view(torch.int32).tolist()
        if memory.identity.key_width:
            held[f"keys {level}"] = memory.keys(level).view(torch.int16).tolist()
    for query in ("amber", "lotus north", "zebra"):
        blocks, scores = memory.search_blocks(query, 50)
        held[f"search {query}"] = (blocks.tolist(), scores.tolist())
    return held


def check_window(context: Any, spans: list[tuple[int, int, int]], cursor: int) -> None:
    """The invariants of a working context, in plain Python."""
    k, cost, position = context.block_size, 0, 0
    for level, start, end in spans:
        assert start == position, "no gap, no overlap"
        if level == 0:
            assert start % k == 0
            assert end == min(start + k, cursor)
            cost += end - start
        else:
            assert start % k**level == 0
            assert end - start == k**level
            assert end <= cursor, "a gist is complete"
            assert end <= max(0, cursor - context.tail_tokens), "the tail is raw"
            cost += context.gist_cost
        position = end
    assert position == cursor
    assert cost <= context.budget
