"""Files of every kind with anything in them: read as they are, or refused by one of our errors."""

from __future__ import annotations

import json
import struct
import tracemalloc
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import Field
from safetensors.torch import save

from megacontext.checkpoints import read_config, read_weights
from megacontext.config import FrozenConfig, load_config
from megacontext.errors import (
    CheckpointError,
    ConfigError,
    CorruptMemoryError,
    MegaContextError,
    MemoryVersionError,
)
from megacontext.gistnet import GistNet, GistNetConfig
from megacontext.lensnet import LensNet, LensNetConfig
from megacontext.memory.acknowledgement import NAME, Acknowledgement
from megacontext.memory.ctx_file import CtxFile
from megacontext.memory.ctx_header import CtxHeader

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


class Inner(FrozenConfig):
    size: int = Field(default=3, ge=1)


class Outer(FrozenConfig):
    seed: int = 0
    name: str = ""
    path: Path | None = None
    levels: tuple[int, ...] = ()
    inner: Inner = Inner()


SHARED = settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(call, *errors) -> bool:
    """Whether a call ends in one of these errors, which then is a line."""
    try:
        call()
    except errors as error:
        said = str(error)
    else:
        return False
    assert "\n" not in said
    assert len(said) < 20_000
    return True


YAML = st.one_of(
    st.binary(max_size=80),
    st.text("ab:-[]{}&*!?|>%@\"'#,\n \t0159.", max_size=60).map(str.encode),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
)


@SHARED
@given(raw=YAML)
@example(raw=b"[" * 300)
@example(raw=b"".join(b" " * depth + b"a:\n" for depth in range(200)))
@example(raw=BOMB.encode())
@example(raw=b"seed: 2001-99-99")
@example(raw=b"seed: " + b"9" * 6000)
@example(raw=b"seed: 0x" + b"f" * 6000)
@example(raw=b"seed: !!timestamp x")
@example(raw=b"seed: !!bool x")
@example(raw=b"seed: !!python/object/apply:os.getcwd []")
@example(raw=b"inner: &x [*x]")
@example(raw=b"? [a]\n: b")
@example(raw=b"1: 2")
@example(raw=b'path: "a\\0b"')
@example(raw=b'name: "\\ud800"')
@example(raw=b"x" * (2 << 20))
def test_any_configuration_file_is_read_or_refused_in_a_line(tmp_path, raw):
    path = tmp_path / "run.yaml"
    path.write_bytes(raw)
    refused(lambda: load_config(Outer, path), ConfigError)


@SHARED
@given(assignment=st.text(st.characters(), max_size=30) | st.from_regex(r"[a-z.]{1,9}=.{0,9}"))
@example(assignment="seed=" + "[" * 300)
@example(assignment="." * 3000 + "=1")
@example(assignment="seed=*x")
def test_any_override_is_taken_or_refused_in_a_line(assignment):
    refused(lambda: load_config(Outer, None, [assignment]), ConfigError)


HEADERS = st.builds(
    lambda magic, numbers, name: struct.pack("<I5H32s", magic, *numbers, name),
    st.sampled_from([0x4D434354, 0x4D434354, 0]),
    st.tuples(
        st.sampled_from([1, 1, 2, 0xFFFF]),
        *[st.sampled_from([0, 1, 2, 3, 32, 0xFFFF])] * 4,
    ),
    st.binary(max_size=32),
)


@SHARED
@given(fields=HEADERS, valid=st.booleans(), rest=st.binary(max_size=40))
def test_any_header_opens_or_is_refused_without_a_large_allocation(tmp_path, fields, valid, rest):
    path = tmp_path / "L1.ctx"
    checksum = zlib.crc32(fields) ^ (not valid)
    path.write_bytes((fields + struct.pack("<I", checksum)).ljust(64, b"\0") + rest)
    tracemalloc.start()
    try:
        if not refused(lambda: CtxFile.open(path), CorruptMemoryError, MemoryVersionError):
            file = CtxFile.open(path)
            assert file.length == len(rest) // file.header.record_bytes
            assert file.map().shape[0] == file.length
            file.close()
            assert valid
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


@SHARED
@given(raw=st.binary(max_size=200))
def test_any_first_bytes_are_a_header_or_refused(raw):
    assert refused(
        lambda: CtxHeader.unpack(raw, Path("L0.ctx")), CorruptMemoryError, MemoryVersionError
    )


@SHARED
@given(raw=st.binary(max_size=300))
def test_any_note_of_a_commit_is_read_or_refused(tmp_path, raw):
    (tmp_path / NAME).write_bytes(raw)
    assert refused(lambda: Acknowledgement.read(tmp_path), CorruptMemoryError)


@SHARED
@given(raw=YAML)
@example(raw=b"[" * 100_000)
@example(raw=b'{"a":' * 50_000)
@example(raw=b'{"model_type": "gistnet", "d_model": ' + b"9" * 6000 + b"}")
@example(raw=b'{"model_type": "gistnet", "d_model": 1e999}')
@example(raw=b'{"model_type": ["gistnet"]}')
@example(raw="{}".encode("utf-16"))
def test_any_checkpoint_configuration_is_refused_in_a_line(tmp_path, raw):
    (tmp_path / "config.json").write_bytes(raw)
    assert refused(lambda: read_config(tmp_path, "gistnet", GistNetConfig), CheckpointError)


def tensors_file(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}}


WHOLE = save({"a": torch.arange(6.0).reshape(2, 3)})


@SHARED
@given(place=st.integers(0, len(WHOLE) - 1), value=st.integers(0, 255), cut=st.booleans())
def test_a_changed_or_cut_weights_file_is_refused_or_has_other_numbers_only(
    tmp_path, place, value, cut
):
    raw = bytearray(WHOLE)
    raw[place] = value
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw[:place] if cut else raw)
    expected = {"a": torch.empty(2, 3)}
    if not refused(lambda: read_weights(path, expected), CheckpointError):
        assert not cut
        assert read_weights(path, expected)["a"].shape == (2, 3)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        struct.pack("<Q", 2**63) + b"{}",
        tensors_file({}),
        tensors_file(b"[" * 100_000),
        tensors_file(tensor("F32", [2**40, 2**40], 0, 24), bytes(24)),
        tensors_file(tensor("F32", [2, 3], 0, 2**62), bytes(24)),
        tensors_file(tensor("F32", [2, 3], 24, 0), bytes(24)),
        tensors_file(tensor("F32", [-2, -3], 0, 24), bytes(24)),
        tensors_file(tensor("F64", [2, 3], 0, 48), bytes(24)),
        tensors_file(tensor("I64", [2, 3], 0, 48), bytes(48)),
        tensors_file(tensor("nothing", [2, 3], 0, 24), bytes(24)),
        b"\x80\x04\x95" + bytes(99),
        b"PK\x03\x04" + bytes(99),
    ],
    ids=lambda raw: repr(raw[:40]),
)
def test_an_absurd_weights_file_is_refused_without_a_large_allocation(tmp_path, raw):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        expected = {"a": torch.empty(2, 3)}
        assert refused(lambda: read_weights(path, expected), CheckpointError)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (GistNet, GistNetConfig(d_model=8, n_heads=2, n_layers=1)),
        (LensNet, LensNetConfig(d_model=8, gist_width=8)),
    ],
    ids=["gistnet", "lensnet"],
)
def test_a_checkpoint_that_claims_an_absurd_size_is_refused_at_once(tmp_path, model, config):
    model(config).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    honest = json.loads(path.read_text())
    for key, value in honest.items():
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        for claimed in (-1, 1 << 14, 1 << 40, "x", None):
            path.write_text(json.dumps({**honest, key: claimed}))
            if not refused(lambda: model.from_pretrained(tmp_path), MegaContextError):
                assert model.from_pretrained(tmp_path).config.model_dump()[key] == claimed
