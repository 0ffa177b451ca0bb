"""A small memory written step by step, and all that it says, so that two can be compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megacontext.memory import Memory, MemoryIdentity, Source
from megacontext.memory.rebuild import GistBatch

IDENTITY = MemoryIdentity(
    base_model="tiny-base",
    tokenizer_hash="tok-1",
    gist_version="gist-1",
    block_size=4,
    gist_width=3,
    key_width=2,
    gist_dtype="fp16",
)
WORDS = ("amber", "birch", "cobalt", "delta", "ember", "fjord", "granite", "harbour")
_LEVELS = 20


def describe(memory: Memory) -> dict[str, Any]:
    """Everything that can be read from a memory, but for the times of its commits."""
    said: dict[str, Any] = {"identity": memory.identity, "tokens": _bytes(memory.tokens())}
    for level in range(1, memory.n_levels):
        said[f"gists {level}"] = _bytes(memory.gists(level))
        said[f"fidelity {level}"] = _bytes(memory.fidelity(level))
        if memory.identity.key_width:
            said[f"keys {level}"] = _bytes(memory.keys(level))
    said["sources"] = [
        (
            source.id,
            source.uri,
            source.author,
            source.tags,
            source.start,
            source.end,
            source.complete,
        )
        for source in memory.sources()
    ]
    for word in WORDS:
        blocks, scores = memory.search_blocks(word, memory.count(1) + 1)
        said[f"search {word}"] = (blocks.tolist(), scores.tolist())
    return said


def read(path: Path) -> dict[str, Any]:
    """What a new reader of a memory is told."""
    with Memory.open(path) as memory:
        return describe(memory)


def batch(identity: MemoryIdentity, have: int, n_tokens: int) -> dict[str, Any]:
    """What comes with ``n_tokens`` tokens after ``have``; it depends on these numbers alone."""
    generator = torch.Generator().manual_seed(have)
    counts = {
        level: new
        for level in range(1, _LEVELS)
        if (
            new := (have + n_tokens) // identity.block_size**level
            - have // identity.block_size**level
        )
    }
    first = have // identity.block_size
    return {
        "tokens": torch.randint(0, 2**31, (n_tokens,), generator=generator),
        "gists": {
            level: torch.randn(count, identity.gist_width, generator=generator)
            for level, count in counts.items()
        },
        "keys": {
            level: torch.randn(count, identity.key_width, generator=generator)
            for level, count in counts.items()
            if identity.key_width
        },
        "fidelity": {
            level: torch.rand(count, generator=generator) for level, count in counts.items()
        },
        "block_texts": [_text(first + block) for block in range(counts.get(1, 0))],
    }


def append(memory: Memory, n_tokens: int, source: Source | None = None) -> None:
    """Appends a batch, as of a source where one is given."""
    source_id = None if source is None else memory.begin_source(source)
    memory.append(**batch(memory.identity, memory.n_tokens, n_tokens), source_id=source_id)


def rebuild(memory: Memory) -> None:
    """Puts gists of another width and number format in the place of all old ones."""

    def make(level: int, _: Callable[[int, int], torch.Tensor]) -> Iterator[GistBatch]:
        count = memory.count(level)
        values = torch.arange(count, dtype=torch.float32)[:, None]
        yield GistBatch(values.expand(-1, 2), values.expand(-1, 1))

    memory.replace_gists(make, gist_version="gist-2", gist_width=2, key_width=1, gist_dtype="bf16")


def small_memory(path: Path) -> None:
    """Makes a memory of four commits, three levels and two sources."""
    with Memory.create(path, IDENTITY) as memory:
        append(memory, 9, Source("file:///first.txt", author="Ada", tags=("a", "b")))
        append(memory, 30)
        append(memory, 1)
        append(memory, 61, Source("file:///second.txt"))


def _append_and_close(memory: Memory) -> None:
    append(memory, 5)
    memory.close()


@dataclass(frozen=True)
class Step:
    """Something that is done to a memory.

    Attributes:
        name: what it is called.
        template: makes the memory that it is done to; ``None`` where there is none yet.
        opened: whether the memory is open for writing when it begins.
        act: does it to the path, or to the open memory.
    """

    name: str
    template: Callable[[Path], None] | None
    opened: bool
    act: Callable[[Path, Memory | None], None]

    def prepare(self, path: Path, template: Path) -> Memory | None:
        """Copies the template; gives the open memory where there is one."""
        if self.template is not None:
            shutil.copytree(template, path)
        return Memory.open(path, "a") if self.opened else None


def _torn(path: Path) -> None:
    """A memory whose last append was cut off, with a file of a rebuild that was."""
    small_memory(path)
    for file in path.glob("*.ctx"):
        with file.open("ab") as raw:
            raw.write(b"\xa5" * 5)
    (path / "L1.g9.ctx").write_bytes(b"left over")


def _on_open(act: Callable[[Memory], None]) -> Callable[[Path, Memory | None], None]:
    def act_on(_: Path, memory: Memory | None) -> None:
        assert memory is not None
        act(memory)

    return act_on


STEPS = (
    Step("create", None, False, lambda path, _: Memory.create(path, IDENTITY).close()),
    Step("open", _torn, False, lambda path, _: Memory.open(path, "a").close()),
    Step(
        "append",
        small_memory,
        True,
        _on_open(lambda memory: append(memory, 70, Source("file:///third.txt"))),
    ),
    Step("rebuild", small_memory, True, _on_open(rebuild)),
    Step("close", small_memory, True, _on_open(_append_and_close)),
)


def _text(block: int) -> str:
    words = [WORDS[block % len(WORDS)], WORDS[block // 3 % len(WORDS)]]
    return " ".join(words * (1 + block % 4))


def _bytes(values: torch.Tensor) -> bytes:
    raw = values.contiguous().view(torch.uint8) if values.numel() else values
    return raw.numpy().tobytes()
