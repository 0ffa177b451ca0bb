"""What stays in RAM of a memory's mapped files, as the system itself counts it."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from megacontext.errors import InputError
from megacontext.memory import KeyIndex, KeyIndexConfig, Memory, MemoryIdentity, resident
from megacontext.memory.key_lists import find_faiss
from megacontext.memory.key_search import KEYS_PER_CHUNK
from megacontext.memory.rebuild import GistBatch
from megacontext.memory.resident import ResidentLimit
from megacontext.runtime.session import SessionConfig

MIB = 1 << 20
BLOCKS, BLOCK, WIDTH, LIMIT_MB = 200_000, 2, 96, 16

on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux tells what is resident"
)
needs_faiss = pytest.mark.skipif(find_faiss() is None, reason="the extra `ann` is not installed")


def resident_bytes(directory: Path) -> int:
    """Bytes that this process has mapped and in RAM of files in a directory."""
    total, counts = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        fields = line.split(None, 5)
        if "-" in fields[0] and not fields[0].endswith(":"):
            name = Path(fields[5]) if len(fields) == 6 else Path()
            counts = name.parent == directory and name.suffix == ".ctx"
        elif counts and fields[0] == "Rss:":
            total += int(fields[1]) * 1024
    return total


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A memory of 37 MiB of keys, 13 of tokens and gists of level 1."""
    path = tmp_path_factory.mktemp("resident").resolve() / "m.mctx"
    generator = torch.Generator().manual_seed(0)
    with Memory.create(path, MemoryIdentity("b", "t", "g", BLOCK, 32, WIDTH, "fp16")) as memory:
        n = BLOCKS * BLOCK
        counts = {level: n // BLOCK**level for level in range(1, n.bit_length())}
        keys = {
            level: torch.randn(m, WIDTH, generator=generator).half() for level, m in counts.items()
        }
        gists = {level: torch.randn(m, 32, generator=generator) for level, m in counts.items()}
        tokens = torch.randint(0, 1000, (n,), generator=generator)
        memory.append(tokens, gists, keys, {level: g[:, 0] for level, g in gists.items()})
    return path


@pytest.fixture
def limited(path):
    with Memory.open(path, resident_mb=LIMIT_MB) as memory:
        yield memory


@pytest.fixture
def free(path):
    with Memory.open(path) as memory:
        yield memory


def unlimited(path, read):
    """What ``read`` returns for the memory without a limit, of which no map stays."""
    with Memory.open(path) as memory:
        return [tensor.clone() for tensor in read(memory)]


def search(memory, config=None, seen=None):
    """The 16 best keys of all; ``seen`` gets what is resident before and after every comparison."""
    asked = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))

    def relevance(keys):
        if seen is not None:
            seen.append(resident_bytes(memory.path))
        found = (asked @ keys.float().T).amax(dim=0)
        if seen is not None:
            seen.append(resident_bytes(memory.path))
        return found

    return KeyIndex(memory, config).search(asked, 16, BLOCKS, relevance)


@on_linux
def test_without_a_limit_a_search_keeps_all_keys_in_ram(free):
    search(free)
    assert free.resident_bytes is None
    assert resident_bytes(free.path) > 36 * MIB


@on_linux
def test_a_search_of_all_keys_stays_below_the_limit(limited):
    seen = []
    found, relevance = search(limited, seen=seen)
    assert max(seen) > LIMIT_MB * MIB // 4
    assert max(*seen, resident_bytes(limited.path)) <= LIMIT_MB * MIB == limited.resident_bytes
    again = search(limited)
    expected = unlimited(limited.path, search)
    for blocks, values in ((found, relevance), again):
        assert torch.equal(blocks, expected[0])
        assert torch.equal(values, expected[1])


@on_linux
@needs_faiss
def test_an_index_over_the_keys_is_built_and_asked_below_the_limit(limited):
    config = KeyIndexConfig(flat_keys=16, codes="fp16", reader_searches=0)
    found, relevance = search(limited, config)
    assert resident_bytes(limited.path) <= LIMIT_MB * MIB
    expected = unlimited(limited.path, lambda memory: search(memory, config))
    assert torch.equal(found, expected[0])
    assert torch.equal(relevance, expected[1])


@on_linux
def test_single_records_from_everywhere_stay_below_the_limit(limited):
    index = torch.randint(0, BLOCKS, (5_000,), generator=torch.Generator().manual_seed(2))
    keys, gists, fidelity = unlimited(
        limited.path,
        lambda memory: (memory.keys(1)[index], memory.gists(1)[index], memory.fidelity(1)[index]),
    )
    assert torch.equal(limited.keys_at(1, index), keys)
    assert resident_bytes(limited.path) <= LIMIT_MB * MIB
    assert torch.equal(limited.gists_at(1, index), gists.float())
    assert torch.equal(limited.fidelity_at(1, index), fidelity)
    assert torch.equal(limited.tokens_at(index), limited.tokens()[index])
    limited.tokens_at(index[:1])
    assert resident_bytes(limited.path) <= LIMIT_MB * MIB


@on_linux
def test_every_part_read_in_turn_stays_below_the_limit(limited):
    tokens, gists, keys = unlimited(
        limited.path, lambda memory: (memory.tokens(), memory.gists(1), memory.keys(1))
    )
    for start in range(0, BLOCKS, 20_000):
        end = start + 20_000
        assert torch.equal(limited.tokens(start, end), tokens[start:end])
        assert torch.equal(limited.gists(1, start, end), gists[start:end])
        assert torch.equal(limited.keys(1, start, end), keys[start:end])
        assert resident_bytes(limited.path) <= LIMIT_MB * MIB


@on_linux
def test_tensors_that_were_handed_out_keep_their_values(limited):
    held = limited.keys(1)
    before, rows = held[::997].clone(), held[100_000:100_010]
    values = rows.clone()
    search(limited)
    assert resident_bytes(limited.path) <= LIMIT_MB * MIB
    assert torch.equal(held[::997], before)
    assert torch.equal(rows, values)
    limited.close()
    assert torch.equal(held[::997], before)


@on_linux
def test_what_is_read_at_once_stays_until_something_else_is_read(limited):
    assert limited.keys(1).float().isfinite().all()
    assert resident_bytes(limited.path) > 36 * MIB
    limited.tokens(0, 1)
    assert resident_bytes(limited.path) <= LIMIT_MB * MIB


@on_linux
def test_it_holds_while_the_memory_grows_and_gists_are_made_anew(path, tmp_path):
    identity = MemoryIdentity("b", "t", "g", 32, 1536, 0, "fp16")
    memory = Memory.create(tmp_path.resolve() / "m.mctx", identity, resident_mb=LIMIT_MB)
    with memory:
        held = []
        for _ in range(4):
            n = memory.n_tokens + 32 * 1500
            counts = {level: n // 32**level - memory.count(level) for level in (1, 2, 3)}
            gists = {level: torch.full((m, 1536), float(level)) for level, m in counts.items()}
            memory.append(torch.zeros(32 * 1500, dtype=torch.int64), gists, {})
            held.append(memory.gists(1, 0, 1000))
            held.append(memory.gists(1, memory.count(1) - 1500))
            assert held[-1].float().sum() == 1500 * 1536
            assert resident_bytes(memory.path) <= LIMIT_MB * MIB

        def make(level, children):
            for start in range(0, memory.count(level), 500):
                stop = min(memory.count(level), start + 500)
                read = children(32 * start, 32 * stop)
                assert read.float().isfinite().all()
                yield GistBatch(torch.full((stop - start, 1536), 7.0))

        memory.replace_gists(make, gist_version="new")
        for start in range(0, memory.count(1), 500):
            assert (memory.gists(1, start, start + 500) == 7).all()
        assert resident_bytes(memory.path) <= LIMIT_MB * MIB
        assert all((old == 1).all() for old in held)


def test_places_read_again_are_not_given_back(path, monkeypatch, limited):
    gone = []
    monkeypatch.setattr(resident, "_give_back", lambda mapped, window: gone.append(window))
    for _ in range(100):
        limited.tokens(0, 10)
        limited.keys(1, 1000, 2000)
        limited.gists_at(1, torch.tensor([5, 5000]))
    assert gone == []
    limited.keys(1)
    assert gone


def test_the_oldest_places_are_given_back_first(tmp_path, monkeypatch):
    gone = []
    monkeypatch.setattr(resident, "_give_back", lambda mapped, window: gone.append(window))
    (tmp_path / "f").write_bytes(b"x")
    with (tmp_path / "f").open("r+b") as file:
        file.truncate(64 * MIB)
        mapped = mmap.mmap(file.fileno(), 0)
    limit = ResidentLimit(16)  # eight windows of 2 MiB
    limit.announce(mapped, 0, 6 * MIB)
    limit.announce(mapped, 6 * MIB, 16 * MIB)
    limit.announce(mapped, 0, 1)
    assert gone == []
    limit.announce(mapped, 40 * MIB - 1, 40 * MIB + 1)
    assert gone == [1, 2]
    limit.announce(mapped, 0, 64 * MIB)
    assert gone == [1, 2]  # the others are asked for again
    limit.announce(mapped, 0, 1)
    assert gone[2:] == list(range(1, 25))


def test_a_map_that_is_gone_counts_no_longer(tmp_path):
    (tmp_path / "f").write_bytes(bytes(4 * MIB))
    limit = ResidentLimit(16)
    for _ in range(20):
        with (tmp_path / "f").open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        limit.announce(mapped, 0, 4 * MIB)
        assert mapped[:1] == b"\0"
    assert len(limit._windows) <= 8


@pytest.mark.parametrize("wrong", [15, 0, -1, 2**20 + 1])
def test_limits_that_make_no_sense_are_refused_before_anything_is_made(tmp_path, path, wrong):
    with pytest.raises(InputError, match="resident_mb"):
        Memory.open(path, resident_mb=wrong)
    with pytest.raises(InputError, match="resident_mb"):
        Memory.create(
            tmp_path / "new", MemoryIdentity("b", "t", "g", 2, 1, 0, "fp16"), resident_mb=wrong
        )
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="resident_mb"):
        SessionConfig(resident_mb=wrong)


def test_a_system_that_takes_no_pages_back_says_so(path, monkeypatch):
    monkeypatch.setattr(resident, "_DONT_NEED", None)
    with pytest.raises(InputError, match="madvise"):
        Memory.open(path, resident_mb=64)
    with Memory.open(path) as memory:
        assert len(search(memory)[0]) == 16


def test_keys_are_read_in_pieces_that_fit(limited, free):
    def most(memory):
        return KeyIndex(memory)._at_once

    assert most(free) == KEYS_PER_CHUNK
    assert most(limited) % 8192 == 0
    assert most(limited) * 2 * WIDTH <= LIMIT_MB * MIB // 2


def test_single_keys_are_those_of_the_whole_level(limited, free):
    index = torch.tensor([7, 0, 199_999, 7])
    for memory in (limited, free):
        assert torch.equal(memory.keys_at(1, index), free.keys(1)[index])
        assert memory.keys_at(1, index[:0]).shape == (0, WIDTH)
        for level, wrong in ((1, BLOCKS), (1, -1), (0, 0), (40, 0)):
            with pytest.raises(InputError, match="no such keys"):
                memory.keys_at(level, torch.tensor([wrong]))
