"""Files of every ``.ctx`` version ever written must stay readable, and be written the same way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megacontext.memory.ctx_file import CtxFile
from megacontext.memory.ctx_header import CtxDtype, CtxHeader
from megacontext.memory.number_formats import as_stored, quantize

DATA = Path(__file__).parent / "data"

TOKENS = torch.tensor([0, 1, 255, 65536, 2**31 - 1, 42, 7, 7, 100000], dtype=torch.int32)
GISTS = torch.tensor(
    [[0.0, -0.0, 1.0, -2.5], [65504.0, 6.103515625e-05, 5.960464477539063e-08, 0.333251953125]]
)

FILES = {
    "v1.L0.ctx": (CtxHeader(0, 4, 0, CtxDtype.U32, "golden-base"), TOKENS),
    "v1.L1.ctx": (CtxHeader(1, 4, 4, CtxDtype.FP16, "golden-base"), GISTS.half()),
    "v1.L1.bf16.ctx": (CtxHeader(1, 4, 4, CtxDtype.BF16, "golden-base"), GISTS.bfloat16()),
    "v2.L1.int8.ctx": (CtxHeader(1, 4, 4, CtxDtype.INT8, "golden-base"), as_stored(GISTS, "int8")),
}


@pytest.mark.parametrize("name", sorted(FILES))
def test_golden_files_are_read_as_they_were_written(name):
    header, values = FILES[name]
    file = CtxFile.open(DATA / name)
    assert file.header == header
    assert file.map().dtype == values.dtype
    assert torch.equal(file.map(), values)


@pytest.mark.parametrize("name", sorted(FILES))
def test_golden_files_are_written_byte_for_byte(name, tmp_path):
    header, values = FILES[name]
    file = CtxFile.create(tmp_path / name, header)
    raw = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
    raw = quantize(raw) if header.dtype is CtxDtype.INT8 else raw
    file.append(np.asarray(raw.numpy()))
    file.close()
    assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes()


def test_the_bytes_of_an_int8_file_are_these():
    raw = (DATA / "v2.L1.int8.ctx").read_bytes()
    # Version 2, level 1, block size 4, width 4, number format 3.
    assert raw[4:14] == bytes([2, 0, 1, 0, 4, 0, 4, 0, 3, 0])
    scale = torch.tensor(2.5 / 127).bfloat16().view(torch.int16).item()
    first = raw[64:70]
    assert int.from_bytes(first[:2], "little") == scale
    assert [byte - 256 * (byte > 127) for byte in first[2:]] == [0, 0, 51, -127]
    assert len(raw) == 64 + 2 * 6


def test_no_golden_file_is_forgotten():
    assert {path.name for path in DATA.glob("*.ctx")} == set(FILES)
