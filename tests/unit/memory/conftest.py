"""A memory small enough to check byte by byte, and what an append to it has to carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from megacontext.memory import Memory, MemoryIdentity
from megacontext.memory.number_formats import as_stored

IDENTITY = MemoryIdentity(
    base_model="tiny-base",
    tokenizer_hash="tok-1",
    gist_version="gist-1",
    block_size=4,
    gist_width=3,
    key_width=2,
    gist_dtype="fp16",
)


@dataclass
class Feeder:
    """Appends random tokens with all that belongs to them, and remembers what went in."""

    memory: Memory
    seed: int = 0
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    gists: dict[int, torch.Tensor] = field(default_factory=dict)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    fidelity: dict[int, torch.Tensor] = field(default_factory=dict)

    def batch(self, n: int) -> dict:
        identity, have = self.memory.identity, self.memory.n_tokens
        generator = torch.Generator().manual_seed(self.seed + have)
        dtype = torch.bfloat16 if identity.gist_dtype == "bf16" else torch.float16
        counts = {}
        for level in range(1, 20):
            span = identity.block_size**level
            new = (have + n) // span - have // span
            if new:
                counts[level] = new
        return {
            "tokens": torch.randint(0, 2**31, (n,), generator=generator),
            "gists": {
                level: as_stored(
                    torch.randn(m, identity.gist_width, generator=generator), identity.gist_dtype
                )
                for level, m in counts.items()
            },
            "keys": {
                level: torch.randn(m, identity.key_width, generator=generator).to(dtype)
                for level, m in counts.items()
                if identity.key_width
            },
            "fidelity": {
                level: torch.rand(m, generator=generator).half().float()
                for level, m in counts.items()
            },
        }

    def append(self, n: int, **extra) -> tuple[int, int]:
        batch = self.batch(n)
        span = self.memory.append(**{**batch, **extra})
        self.tokens = torch.cat([self.tokens, batch["tokens"]])
        for name in ("gists", "keys", "fidelity"):
            stored = getattr(self, name)
            for level, values in batch[name].items():
                stored[level] = torch.cat([stored[level], values]) if level in stored else values
        return span

    def check(self, memory: Memory | None = None) -> None:
        memory = memory or self.memory
        assert memory.n_tokens == len(self.tokens)
        assert torch.equal(memory.tokens(), self.tokens.to(torch.int32))
        assert memory.n_levels == 1 + max(self.gists, default=0)
        for level, values in self.gists.items():
            assert memory.count(level) == len(values)
            assert torch.equal(memory.gists(level), values)
            assert torch.equal(memory.fidelity(level), self.fidelity[level])
            if memory.identity.key_width:
                assert torch.equal(memory.keys(level), self.keys[level])


@pytest.fixture
def identity() -> MemoryIdentity:
    return IDENTITY


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Feeder]:
    """Makes a memory with the given identity fields changed, and closes it after the test."""
    made: list[Memory] = []

    def build(name: str = "m.mctx", **changes) -> Feeder:
        memory = Memory.create(tmp_path / name, replace(IDENTITY, **changes))
        made.append(memory)
        return Feeder(memory)

    yield build
    for memory in made:
        memory.close()
