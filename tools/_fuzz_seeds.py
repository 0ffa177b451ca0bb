"""Whole inputs that a fuzz target's mutations start from: from nothing it would never find them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save

from megacontext.gistnet import GistNetConfig
from megacontext.memory.acknowledgement import NAME, Acknowledgement
from megacontext.memory.catalog_rows import Chunk
from megacontext.memory.ctx_header import HEADER_BYTES, CtxDtype, CtxHeader
from megacontext.runtime.recording_format import Outcome, RecordingEnd, SessionHeader, new_call
from megacontext.runtime.session import SessionConfig

EXPECTED_WEIGHTS = {"a": torch.empty(2, 3)}
_CTX_FIELDS, _NOTE_FIELDS, _NOTE_SLOT = 46, 60, 128


def sealed_header(data: bytes) -> bytes:
    """A ``.ctx`` file whose header's checksum and padding are right, whatever it says."""
    fields = data[:_CTX_FIELDS].ljust(_CTX_FIELDS, b"\0")
    header = (fields + _checksum(fields)).ljust(HEADER_BYTES, b"\0")
    return header + data[HEADER_BYTES:]


def sealed_note(data: bytes) -> bytes:
    """A note of a commit whose checksums are right, whatever it says."""
    slots = (data[:_NOTE_SLOT], data[_NOTE_SLOT:])
    fields = [slot[:_NOTE_FIELDS].ljust(_NOTE_FIELDS, b"\0") for slot in slots]
    return b"".join((raw + _checksum(raw)).ljust(_NOTE_SLOT, b"\0") for raw in fields)


def _checksum(raw: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(raw))


def _ctx() -> list[bytes]:
    kinds = ((0, 0, CtxDtype.U32), (1, 3, CtxDtype.FP16), (2, 5, CtxDtype.INT8))
    headers = [CtxHeader(level, 4, width, dtype, "base") for level, width, dtype in kinds]
    return [header.pack() + bytes(range(3 * header.record_bytes)) for header in headers]


def _note() -> list[bytes]:
    with TemporaryDirectory() as folder:
        for generation in (1, 2):
            tail = Chunk(0, generation, 5)
            Acknowledgement(generation, generation, "0f" * 16, tail).write(Path(folder))
        return [(Path(folder) / NAME).read_bytes()]


def _config() -> list[bytes]:
    values = SessionConfig().model_dump(mode="json")
    texts = ["device: cpu\nengine: {budget: 512}\nmodel: &a bundled:tiny\n", json.dumps(values)]
    return [text.encode() for text in texts]


def _override() -> list[bytes]:
    return [b"engine.budget=512\nmodel=bundled:tiny", b"lens=null\nengine={tail_tokens: 5}"]


def _checkpoint() -> list[bytes]:
    values = GistNetConfig(d_model=8, n_heads=2, n_layers=1).model_dump(mode="json")
    return [json.dumps({"model_type": "gistnet", **values}).encode()]


def _weights() -> list[bytes]:
    return [save({name: torch.zeros_like(value) for name, value in EXPECTED_WEIGHTS.items()})]


def _text() -> list[bytes]:
    texts = ("plain\n\0", "Grüße, 世界 🌍\r\n", "e\u0301\ufeff\u202e\U0010ffff")
    return [text.encode() for text in texts] + ["Grüße".encode("latin-1"), b"\xed\xa0\x80"]


def _recording() -> list[bytes]:
    header = SessionHeader(config={}, models={"base": "tiny"}, platform={"torch": "2"}).sealed()
    call = new_call(number=0, name="generate", prompt="Who?")
    outcome = Outcome(number=0, tokens=(1, 2), text="x", taken=2, n_tokens=2, cost=2)
    lines = (header, call, outcome, RecordingEnd(calls=1))
    return ["".join(line.to_json() + "\n" for line in lines).encode()]


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "ctx": _ctx,
    "note": _note,
    "config": _config,
    "override": _override,
    "checkpoint": _checkpoint,
    "weights": _weights,
    "text": _text,
    "recording": _recording,
    "rows": lambda: [bytes(range(97, 200))],
    "memory": lambda: [bytes(12), bytes(range(60))],
}


def write_seeds(target: str, folder: Path) -> None:
    """Puts a target's seeds into a folder, a file each."""
    for number, raw in enumerate(SEEDS[target]()):
        (folder / f"{target}-{number}").write_bytes(raw)
