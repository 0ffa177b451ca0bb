from __future__ import annotations

import struct
import zlib
from pathlib import Path

import pytest

from megacontext.errors import ConfigError, CorruptMemoryError, MemoryVersionError
from megacontext.memory.ctx_header import CtxDtype, CtxHeader, fit_model_name

HEADER = CtxHeader(level=2, block_size=32, width=256, dtype=CtxDtype.BF16, base_model="base/né")
PATH = Path("L2.ctx")


def handmade(magic=0x4D434354, version=1, level=2, block=32, width=256, dtype=2, name=b"base"):
    fields = struct.pack("<I", magic)
    for number in (version, level, block, width, dtype):
        fields += struct.pack("<H", number)
    fields += name.ljust(32, b"\0")
    assert len(fields) == 46
    return fields + struct.pack("<I", zlib.crc32(fields)) + bytes(14)


def test_layout_is_the_documented_one():
    assert HEADER.pack() == handmade(name="base/né".encode())
    assert HEADER.pack()[:4] == b"TCCM"
    assert CtxHeader.unpack(HEADER.pack(), PATH) == HEADER


def test_every_changed_byte_is_noticed():
    raw = HEADER.pack()
    for place in range(64):
        for flip in (1, 0x80, 0xFF):
            changed = bytearray(raw)
            changed[place] ^= flip
            with pytest.raises(CorruptMemoryError):
                CtxHeader.unpack(bytes(changed), PATH)


@pytest.mark.parametrize("length", [0, 1, 63])
def test_a_short_header_is_corrupt_and_says_where_it_ends(length):
    with pytest.raises(CorruptMemoryError) as caught:
        CtxHeader.unpack(HEADER.pack()[:length], PATH)
    assert caught.value.offset == length


def test_an_intact_header_of_another_version_is_no_damage():
    with pytest.raises(MemoryVersionError, match="version 3"):
        CtxHeader.unpack(handmade(version=3), PATH)


def test_version_2_is_that_of_int8_records_and_of_nothing_else():
    header = CtxHeader.unpack(handmade(version=2, dtype=3), PATH)
    assert (header.dtype, header.record_bytes, header.record_shape) == (CtxDtype.INT8, 258, (258,))
    assert header.pack() == handmade(version=2, dtype=3)
    for version, dtype in ((2, 2), (2, 1), (1, 3)):
        with pytest.raises(CorruptMemoryError, match="records in a file of version"):
            CtxHeader.unpack(handmade(version=version, dtype=dtype), PATH)


@pytest.mark.parametrize(
    "fields", [{"dtype": 3}, {"dtype": 0}, {"width": 0}, {"name": b"\xff\xfe"}, {"name": b"a\0b"}]
)
def test_fields_that_make_no_sense_are_corrupt(fields):
    with pytest.raises(CorruptMemoryError):
        CtxHeader.unpack(handmade(**fields), PATH)


@pytest.mark.parametrize(
    "fields",
    [
        {"level": -1},
        {"width": 65536},
        {"block_size": 70000},
        {"base_model": "x" * 33},
        {"dtype": CtxDtype.U32},
    ],
)
def test_values_that_do_not_fit_are_refused(fields):
    given = {"level": 1, "block_size": 32, "width": 8, "dtype": CtxDtype.FP16, "base_model": "b"}
    with pytest.raises(ConfigError):
        CtxHeader(**{**given, **fields})


def test_long_model_names_are_cut_between_characters_and_stay_distinct():
    long = "organisation/" + "ü" * 40
    short = fit_model_name(long)
    assert len(short.encode()) <= 32
    assert short.startswith("organisation/")
    assert short != fit_model_name(long + "2")
    assert fit_model_name("x" * 32) == "x" * 32
