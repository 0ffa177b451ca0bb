"""Damages copies of a small memory and looks at what is said about them.

It reads cases from standard input, a JSON object per line, and answers each with what came of it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sqlite3
import struct
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from megacontext.errors import (
    CorruptMemoryError,
    MegaContextError,
    MemoryStoreError,
    MemoryVersionError,
)
from megacontext.memory import KeyIndex, KeyIndexConfig, Memory, Source
from megacontext.memory.schema import CATALOG_NAME
from tools._memory_script import IDENTITY, append, describe, read, small_memory

MASKS: Final = {"one bit": None, "lowest bit": 1, "highest bit": 0x80, "all bits": 0xFF}
_DATABASE_HEADER: Final = 100
_LOG_HEADER: Final = 32
_FRAME_HEADER: Final = 24
_PAGE_HEADERS: Final = {2: 12, 5: 12, 10: 8, 13: 8}
_SECONDS: Final = 60
# More than this beyond what the models' libraries take is a huge allocation.
_MORE_BYTES: Final = 1 << 30
# An index over any number of keys, all of which it looks at.
_KEY_INDEX: Final = KeyIndexConfig(flat_keys=16, rerank=1 << 20)
_HEADER: Final = struct.Struct("<IHHHHH32s")
_ABSURD: Final = (
    {"version": 9},
    {"level": 0xFFFF},
    {"block": 0},
    {"block": 0xFFFF},
    {"width": 0xFFFF},
    {"dtype": 0xFFFF},
    {"name": b"\xff" * 32},
)
_STATEMENTS: Final = (
    "UPDATE files SET length = 1 << 62",
    "UPDATE files SET length = -1",
    "UPDATE files SET length = 'many'",
    "UPDATE files SET level = 1 << 40 WHERE kind = 'tokens'",
    "UPDATE files SET name = '../' || name",
    "UPDATE files SET name = 'L9.ctx' WHERE kind = 'tokens'",
    "DELETE FROM files WHERE kind = 'tokens'",
    "UPDATE chunks SET count = 1 << 62",
    "UPDATE chunks SET start = 1 << 62",
    "UPDATE chunks SET crc32 = x'00'",
    "UPDATE commits SET n_tokens = 1 << 62",
    "UPDATE commits SET n_tokens = n_tokens - 1",
    "UPDATE commits SET generation = generation + 100",
    "DELETE FROM commits WHERE generation > 0",
    "UPDATE meta SET value = '65535' WHERE key = 'gist_width'",
    "UPDATE meta SET value = '2' WHERE key = 'block_size'",
    "UPDATE meta SET value = '1e9' WHERE key = 'block_size'",
    "UPDATE meta SET value = x'ff' WHERE key = 'base_model'",
    "UPDATE meta SET value = 'fp8' WHERE key = 'gist_dtype'",
    "DELETE FROM meta WHERE key = 'row_sum'",
    "UPDATE sources SET tags = '[['",
    "UPDATE sources SET tags = '{}'",
    "UPDATE sources SET start_token = 'x' WHERE id = 1",
    "UPDATE sources SET end_token = 1 << 62",
    "UPDATE sources SET uri = CAST(x'ff' AS TEXT)",
    "DELETE FROM sources",
    "DELETE FROM blocks_data WHERE id > 1000",
    "UPDATE blocks_data SET block = zeroblob(4000000)",
    "DELETE FROM blocks_docsize",
    "DELETE FROM blocks_idx",
    "DROP TABLE chunks",
    "DROP TABLE blocks",
)


@dataclass(frozen=True)
class State:
    """A memory that was closed, or whose writer was killed.

    Attributes:
        path: it; nothing opens it here.
        said: all that it says when it is whole.
    """

    path: Path
    said: dict[str, Any]

    def files(self) -> dict[str, int]:
        """Its files' sizes."""
        return {file.name: file.stat().st_size for file in sorted(self.path.iterdir())}


def make_states(folder: Path) -> dict[str, State]:
    """The memories that are damaged, and others whose files are put in their place."""
    small_memory(folder / "closed")
    with Memory.open(folder / "closed", "a") as memory:
        KeyIndex(memory, _KEY_INDEX).update()
    if not (child := os.fork()):
        memory = Memory.create(folder / "killed", IDENTITY)
        for n_tokens in (9, 30, 62):
            append(memory, n_tokens, Source(f"file:///{n_tokens}.txt"))
        os._exit(0)
    os.waitpid(child, 0)
    with Memory.create(folder / "longer", IDENTITY) as memory:
        append(memory, 300)
    with Memory.create(folder / "same length", IDENTITY) as memory:
        for n_tokens in (50, 51):
            append(memory, n_tokens)
    with Memory.create(folder / "other", replace(IDENTITY, base_model="other")) as memory:
        append(memory, 101)
    states: dict[str, State] = {}
    for path in sorted(folder.iterdir()):
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(path, Path(copy) / "m.mctx")
            states[path.name] = State(path, read(Path(copy) / "m.mctx"))
    return states


def flips(state: State, name: str, places: Iterable[int], mask: str) -> dict[str, Any]:
    """Changes one byte at a time; then, to go on writing, all at once that change nothing.

    Returns:
        ``detected``: how many; ``harmless``: how many of each part of a file.
    """
    harmless: list[int] = []
    detected = 0
    whole = {file: (state.path / file).read_bytes() for file in state.files()}
    with tempfile.TemporaryDirectory(prefix="megacontext-flips-") as folder:
        path = Path(folder) / "m.mctx"
        shutil.copytree(state.path, path)
        for place in places:
            _xor(path / name, place, mask)
            if _is_detected(path):
                detected += 1
            else:
                what = f"{name}, byte {place}: verify passes, but the contents differ"
                _promise(read(path) == state.said, what)
                harmless.append(place)
            # Reading may have written SQLite's scratch files anew.
            _restore(path, whole)
        _expect_all_harmless(path, state, name, harmless, mask)
    parts = Counter(part_of(state, name, place) for place in harmless)
    return {"detected": detected, "harmless": dict(parts)}


def _expect_all_harmless(
    path: Path, state: State, name: str, places: Sequence[int], mask: str
) -> None:
    """Goes on writing with bytes changed; one by one if that fails, to name the one."""
    if not places:
        return
    for place in places:
        _xor(path / name, place, mask)
    try:
        _expect_harmless(path, state, f"{name}, {len(places)} bytes from {places[0]}")
        return
    except MegaContextError:
        if len(places) == 1:
            raise
    for place in places:
        shutil.rmtree(path)
        shutil.copytree(state.path, path)
        _xor(path / name, place, mask)
        _expect_harmless(path, state, f"{name}, byte {place}")


def _restore(path: Path, whole: dict[str, bytes]) -> None:
    for file in path.iterdir():
        if file.name not in whole:
            file.unlink()
    for name, raw in whole.items():
        if not (path / name).exists() or (path / name).read_bytes() != raw:
            (path / name).write_bytes(raw)


def _xor(file: Path, place: int, mask: str) -> None:
    with file.open("r+b") as raw:
        raw.seek(place)
        old = raw.read(1)
        raw.seek(place)
        raw.write(bytes([old[0] ^ (MASKS[mask] or 1 << place % 8)]))


def part_of(state: State, name: str, place: int) -> str:
    """What a byte of a file is there for (SQLite's file format: sqlite.org/fileformat2.html)."""
    if name != CATALOG_NAME:
        return name
    raw = (state.path / name).read_bytes()
    size = int.from_bytes(raw[16:18], "big")
    number, offset = place // size + 1, place % size
    page = raw[place - offset : place - offset + size]
    if number in _logged_pages(state.path / f"{name}-wal", size):
        part = "a page that the log has anew"
    elif place < _DATABASE_HEADER:
        part = f"database header, byte {place}"
    elif number in _free_pages(raw, size):
        part = "a page that is not in use"
    elif _is_unused(page, _DATABASE_HEADER if number == 1 else 0, offset):
        part = "unused space of a page"
    else:
        near = page[max(0, offset - 12) : offset + 12]
        part = f"page {number}, byte {offset}, in {near!r}"
    return f"{name}: {part}"


def _is_unused(page: bytes, start: int, offset: int) -> bool:
    """Whether a byte of a b-tree page belongs to no cell."""
    if page[start] not in _PAGE_HEADERS:
        return False
    free, cells, content = struct.unpack(">HHH", page[start + 1 : start + 7])
    pointers = start + _PAGE_HEADERS[page[start]]
    unused = pointers + 2 * cells <= offset < (content or len(page))
    while free and not unused:
        following, length = struct.unpack(">HH", page[free : free + 4])
        unused = free + 4 <= offset < free + length
        free = following
    return unused


def _logged_pages(log: Path, size: int) -> set[int]:
    """Numbers of the pages in SQLite's log."""
    raw = log.read_bytes() if log.exists() else b""
    frames = range(_LOG_HEADER, len(raw), _FRAME_HEADER + size)
    return {int.from_bytes(raw[frame : frame + 4], "big") for frame in frames}


def _free_pages(raw: bytes, size: int) -> set[int]:
    """Numbers of the pages on SQLite's free list."""
    found: set[int] = set()
    (trunk,) = struct.unpack(">I", raw[32:36])
    while trunk:
        page = raw[(trunk - 1) * size : trunk * size]
        following, count = struct.unpack(">II", page[:8])
        found |= {trunk, *struct.unpack(f">{count}I", page[8 : 8 + 4 * count])}
        trunk = following
    return found


def damages(states: dict[str, State], state: State) -> dict[str, Callable[[Path], None]]:
    """Everything else that is done to a memory, by name."""
    found: dict[str, Callable[[Path], None]] = {}
    names = state.files()
    for name, size in names.items():
        for length in sorted({0, 1, 63, 64, 65, size // 2, max(0, size - 1)}):
            if length < size:
                found[f"{name} cut to {length} bytes"] = _cut(name, length)
        found[f"{name} removed"] = lambda path, name=name: (path / name).unlink()
        for other in names:
            if name < other and (name.endswith(".ctx") or "catalog" in name):
                found[f"{name} and {other} swapped"] = _swap(name, other)
        for foreign, memory in states.items():
            if memory is not state and (memory.path / name).exists():
                found[f"{name} of a memory that is {foreign}"] = _foreign(name, memory.path)
        if name.endswith(".ctx"):
            for fields in _ABSURD:
                found[f"{name} with header {fields}"] = _absurd(name, fields)
    for statement in _STATEMENTS:
        found[statement] = _executed(statement)
    return found


def damage(states: dict[str, State], state: State, name: str) -> str:
    """Does one of :func:`damages` and looks at what is said.

    Returns:
        ``detected``; ``detected by verify`` where the memory can still be opened; ``harmless``.

    Raises:
        CorruptMemoryError: a promise is broken.
    """
    with tempfile.TemporaryDirectory(prefix="megacontext-damage-") as folder:
        path = Path(folder) / "m.mctx"
        shutil.copytree(state.path, path)
        damages(states, state)[name](path)
        if not _is_detected(path):
            _expect_harmless(path, state, name)
            return "harmless"
        opened = False
        for mode in ("r", "a"):
            try:
                with Memory.open(path, mode) as memory:
                    opened |= describe(memory) != state.said
            except MemoryStoreError as error:
                _promise(_names_the_place(error, state), f"{name}: {error!r}")
        # To look at every row of the catalog would make opening slower with every commit.
        _promise(not opened or name in _STATEMENTS, f"{name}: opened with other contents")
        return "detected by verify" if opened else "detected"


def _is_detected(path: Path) -> bool:
    try:
        return not Memory.verify_path(path).ok
    except MemoryStoreError as error:
        _promise("\n" not in str(error), f"two lines: {error}")
        return True


def _names_the_place(error: MemoryStoreError, state: State) -> bool:
    """Whether an error is of the kind that damage has, a line, and tells the damaged file."""
    told = str(error)
    kind = isinstance(error, CorruptMemoryError | MemoryVersionError)
    return kind and "\n" not in told and any(name in told for name in state.files())


def _expect_harmless(path: Path, state: State, what: str) -> None:
    """What ``verify`` lets pass must change nothing that is ever read, now or after a commit."""
    _promise(read(path) == state.said, f"{what}: verify passes, but the contents differ")
    with Memory.open(path, "a") as memory:
        _expect_best_keys(memory, what)
        append(memory, 40)
        _expect_best_keys(memory, what)
        _promise(memory.verify().ok, f"{what}: verify fails after an append")
        _promise(
            memory.tokens().numpy().tobytes().startswith(state.said["tokens"]),
            f"{what}: tokens differ after an append",
        )
    _promise(Memory.verify_path(path).ok, f"{what}: verify fails after an append and closing")


def _expect_best_keys(memory: Memory, what: str) -> None:
    """What the index of keys finds is what comparing all of them finds."""
    if not memory.identity.key_width:
        return
    count, query = memory.count(1), torch.ones(1, memory.identity.key_width)

    def relevance(keys: torch.Tensor) -> torch.Tensor:
        return (query @ keys.float().T)[0]

    blocks, _ = KeyIndex(memory, _KEY_INDEX).search(query, count // 2, count, relevance)
    best = relevance(memory.keys(1)).argsort(descending=True)[: count // 2]
    _promise(torch.equal(blocks, best), f"{what}: the index of keys finds others than the best")


def _promise(kept: bool, otherwise: str) -> None:
    if not kept:
        raise CorruptMemoryError(otherwise, path="promise")


def _cut(name: str, length: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, length)


def _swap(name: str, other: str) -> Callable[[Path], None]:
    def swap(path: Path) -> None:
        (path / name).rename(path / "held")
        (path / other).rename(path / name)
        (path / "held").rename(path / other)

    return swap


def _foreign(name: str, memory: Path) -> Callable[[Path], None]:
    def copy(path: Path) -> None:
        shutil.copy(memory / name, path / name)

    return copy


def _absurd(name: str, fields: dict[str, Any]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        raw = bytearray((path / name).read_bytes())
        keys = ("magic", "version", "level", "block", "width", "dtype", "name")
        header = {**dict(zip(keys, _HEADER.unpack_from(raw), strict=True)), **fields}
        packed = _HEADER.pack(*header.values())
        raw[: _HEADER.size + 4] = packed + struct.pack("<I", zlib.crc32(packed))
        (path / name).write_bytes(raw)

    return write


def _executed(statement: str) -> Callable[[Path], None]:
    def execute(path: Path) -> None:
        connection = sqlite3.connect(path / CATALOG_NAME, isolation_level=None)
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute(statement)
        connection.close()

    return execute


def _answer(states: dict[str, State], case: dict[str, Any]) -> dict[str, Any]:
    state = states[case["state"]]
    signal.setitimer(signal.ITIMER_PROF, _SECONDS)
    try:
        if "file" in case:
            return flips(state, case["file"], case["places"], case["mask"])
        return {"outcome": damage(states, state, case["damage"])}
    except MegaContextError as error:
        return {"outcome": f"broken: {getattr(error, 'reason', error)}"}
    except Exception as error:  # noqa: BLE001 - any other is what is looked for
        return {"outcome": f"broken: not one of our errors: {error!r}"}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _limit_memory() -> None:
    """Lets an allocation that is out of all proportion fail, where Linux says what there is."""
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        limit = int(sizes.read_text().split()[0]) * resource.getpagesize() + _MORE_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
    """Answers cases until the input ends; a case that computes for too long ends it as well."""
    with tempfile.TemporaryDirectory(prefix="megacontext-corruption-") as folder:
        states = make_states(Path(folder))
        _limit_memory()
        damaged = {name: states[name] for name in ("closed", "killed")}
        told = {
            name: {"files": state.files(), "damages": list(damages(states, state))}
            for name, state in damaged.items()
        }
        print(json.dumps(told), flush=True)
        for line in sys.stdin:
            print(json.dumps(_answer(states, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
