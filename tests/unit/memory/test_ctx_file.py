from __future__ import annotations

import errno
import os
import stat

import numpy as np
import pytest
import torch

from megacontext.errors import (
    CorruptMemoryError,
    InputError,
    InvariantError,
    MemoryStoreError,
    StorageFullError,
)
from megacontext.memory.ctx_file import CtxFile
from megacontext.memory.ctx_header import CtxDtype, CtxHeader

TOKENS = CtxHeader(level=0, block_size=4, width=0, dtype=CtxDtype.U32, base_model="b")
HALF = CtxHeader(level=1, block_size=4, width=3, dtype=CtxDtype.FP16, base_model="b")
BRAIN = CtxHeader(level=1, block_size=4, width=3, dtype=CtxDtype.BF16, base_model="b")


def test_tokens_come_back_as_int32_without_a_copy(tmp_path):
    file = CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    values = np.array([0, 1, 2**31 - 1, 7], dtype=np.uint32)
    file.append(values)
    first, second = file.map(0, 4), file.map(1, 4)
    assert first.dtype == torch.int32
    assert first.tolist() == values.tolist()
    assert second.data_ptr() == first.data_ptr() + 4
    on_disk = (tmp_path / "L0.ctx").read_bytes()
    assert on_disk == TOKENS.pack() + values.astype("<u4").tobytes()


def test_a_mapped_tensor_is_the_file_itself(tmp_path):
    file = CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    file.append(np.array([5, 6], dtype=np.int32))
    mapped = file.map()
    with (tmp_path / "L0.ctx").open("r+b") as raw:
        raw.seek(64)
        raw.write((9).to_bytes(4, "little"))
    assert mapped.tolist() == [9, 6]


def test_writing_to_a_mapped_tensor_leaves_the_file_alone(tmp_path):
    file = CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    file.append(np.array([5, 6], dtype=np.int32))
    before = (tmp_path / "L0.ctx").read_bytes()
    file.map()[0] = 1
    assert (tmp_path / "L0.ctx").read_bytes() == before


@pytest.mark.parametrize(("header", "dtype"), [(HALF, torch.float16), (BRAIN, torch.bfloat16)])
def test_vectors_round_trip_bit_for_bit(tmp_path, header, dtype):
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    raw = values.view(torch.uint16).numpy() if dtype == torch.bfloat16 else values.numpy()
    with_two = CtxFile.create(tmp_path / "L1.ctx", header)
    with_two.append(raw[:2])
    with_two.append(raw[2:])
    with_two.close()
    file = CtxFile.open(tmp_path / "L1.ctx")
    assert file.length == 5
    assert file.map().dtype == dtype
    assert torch.equal(file.map(1, 4), values[1:4])


def test_growth_is_mapped_again_and_older_tensors_stay(tmp_path):
    file = CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    assert file.map().tolist() == []
    file.append(np.arange(3, dtype=np.int32))
    old = file.map()
    file.append(np.arange(3, 5000, dtype=np.int32))
    assert torch.equal(file.map(), torch.arange(5000, dtype=torch.int32))
    file.close()
    assert old.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 4), (3, 2), (4, 4)])
def test_ranges_outside_the_file_are_refused(tmp_path, start, stop):
    file = CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    file.append(np.arange(3, dtype=np.int32))
    with pytest.raises(InputError):
        file.map(start, stop)


@pytest.mark.parametrize(
    "records",
    [
        np.zeros((2, 4), dtype=np.float16),
        np.zeros((2, 3), dtype=np.float32),
        np.zeros(3, dtype=np.float16),
        np.zeros((), dtype=np.float16),
    ],
)
def test_records_of_another_shape_or_format_are_refused(tmp_path, records):
    file = CtxFile.create(tmp_path / "L1.ctx", HALF)
    with pytest.raises(InvariantError):
        file.append(records)
    assert file.stored_bytes() == 64


def test_truncate_cuts_and_never_grows(tmp_path):
    file = CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    file.append(np.arange(9, dtype=np.int32))
    file.truncate(4)
    assert (file.length, file.stored_bytes()) == (4, 64 + 16)
    assert file.map().tolist() == [0, 1, 2, 3]
    with pytest.raises(InvariantError):
        file.truncate(5)


def test_a_file_shorter_than_promised_says_at_which_record_and_byte(tmp_path):
    path = tmp_path / "L1.ctx"
    file = CtxFile.create(path, HALF)
    file.append(np.zeros((4, 3), dtype=np.float16))
    file.close()
    os.truncate(path, 64 + 2 * 6 + 5)
    with pytest.raises(CorruptMemoryError) as caught:
        CtxFile.open(path, length=4)
    assert (caught.value.level, caught.value.index, caught.value.offset) == (1, 2, 76)


def test_a_header_that_promises_huge_records_allocates_nothing(tmp_path):
    huge = CtxHeader(
        level=65535, block_size=65535, width=65535, dtype=CtxDtype.FP16, base_model="b"
    )
    (tmp_path / "L1.ctx").write_bytes(huge.pack() + b"\1" * 100)
    assert CtxFile.open(tmp_path / "L1.ctx").map().shape == (0, 65535)
    with pytest.raises(CorruptMemoryError):
        CtxFile.open(tmp_path / "L1.ctx", length=2**40)
    with pytest.raises(CorruptMemoryError):
        CtxFile.open(tmp_path / "L9.ctx")


def test_a_file_cut_under_an_open_memory_is_corrupt_not_a_crash(tmp_path):
    file = CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    file.append(np.arange(5000, dtype=np.int32))
    os.truncate(tmp_path / "L0.ctx", 100)
    with pytest.raises(CorruptMemoryError):
        file.map()


def test_crc_covers_only_what_is_there(tmp_path):
    file = CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    file.append(np.arange(3, dtype=np.int32))
    assert file.crc32(0, 2**50)[1] == 12


def test_only_the_owner_may_read_and_an_existing_file_is_not_overwritten(tmp_path):
    file = CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    assert stat.S_IMODE((tmp_path / "L0.ctx").stat().st_mode) == 0o600
    file.close()
    with pytest.raises(MemoryStoreError):
        CtxFile.create(tmp_path / "L0.ctx", TOKENS)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    file = CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, bytes(data)[:3], at))
    file.append(np.arange(5, dtype=np.int32))
    assert file.map().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (errno.ENOSPC, StorageFullError),
        (errno.EDQUOT, StorageFullError),
        (errno.EIO, MemoryStoreError),
    ],
)
def test_failed_creation_leaves_no_file(tmp_path, monkeypatch, number, expected):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(expected, match=r"L0\.ctx"):
        CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_writes_nothing_is_a_full_disk(tmp_path, monkeypatch):
    file = CtxFile.create(tmp_path / "L0.ctx", TOKENS)
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(StorageFullError):
        file.append(np.arange(5, dtype=np.int32))
    assert file.length == 0
