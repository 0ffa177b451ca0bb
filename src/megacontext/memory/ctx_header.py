"""The 64-byte header of a ``.ctx`` file."""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Final

from megacontext.errors import ConfigError, CorruptMemoryError, MemoryVersionError
from megacontext.memory.number_formats import SCALE_BYTES

HEADER_BYTES: Final = 64
MAGIC: Final = 0x4D434354
CTX_VERSION: Final = 1
INT8_VERSION: Final = 2
"""Version of files whose records are int8 with a scale; all others are still of version 1."""

_FIELDS = struct.Struct("<IHHHHH32s")
_CRC = struct.Struct("<I")
_NAME_BYTES = 32
_NAME_DIGEST_CHARS = 8
_U16_MAX = 0xFFFF


class CtxDtype(IntEnum):
    """Number format of the records; those of ``INT8`` begin with a scale."""

    U32 = 0
    FP16 = 1
    BF16 = 2
    INT8 = 3

    @property
    def itemsize(self) -> int:
        """Bytes per number."""
        return {CtxDtype.U32: 4, CtxDtype.INT8: 1}.get(self, 2)


def fit_model_name(name: str) -> str:
    """Shortens a base-model name to the 32 UTF-8 bytes the header has for it.

    A longer name keeps its beginning, then ``~`` and the start of its SHA-256, so that two long
    names which share their beginning still differ.
    """
    encoded = name.encode("utf-8")
    if len(encoded) <= _NAME_BYTES:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:_NAME_DIGEST_CHARS]
    kept = encoded[: _NAME_BYTES - _NAME_DIGEST_CHARS - 1].decode("utf-8", errors="ignore")
    return f"{kept}~{digest}"


@dataclass(frozen=True)
class CtxHeader:
    """What the first 64 bytes of a ``.ctx`` file say.

    Args:
        level: level of the tree; 0 for tokens.
        block_size: tokens per block (``K``).
        width: numbers per record; 0 for tokens, which are single numbers.
        dtype: number format.
        base_model: base-model name, at most 32 bytes (see :func:`fit_model_name`).

    Raises:
        ConfigError: a field does not fit into the header.
    """

    level: int
    block_size: int
    width: int
    dtype: CtxDtype
    base_model: str

    def __post_init__(self) -> None:
        for name, value in (
            ("level", self.level),
            ("block_size", self.block_size),
            ("width", self.width),
        ):
            if not 0 <= value <= _U16_MAX:
                raise ConfigError(f".ctx header: {name} is {value}, allowed are 0 to {_U16_MAX}")
        encoded = self.base_model.encode("utf-8")
        if len(encoded) > _NAME_BYTES or b"\0" in encoded:
            raise ConfigError(
                f".ctx header: base-model name {self.base_model!r} must have at most "
                f"{_NAME_BYTES} bytes, none of them zero"
            )
        if (self.width == 0) != (self.dtype is CtxDtype.U32):
            raise ConfigError(
                f".ctx header: width {self.width} does not go with {self.dtype.name}; "
                "tokens have width 0, vectors at least 1"
            )

    @property
    def record_bytes(self) -> int:
        """Bytes per record."""
        scale = SCALE_BYTES if self.dtype is CtxDtype.INT8 else 0
        return scale + max(self.width, 1) * self.dtype.itemsize

    @property
    def record_shape(self) -> tuple[int, ...]:
        """Shape of a record as an array: a token, numbers, or the bytes of an int8 record."""
        if self.dtype is CtxDtype.INT8:
            return (self.record_bytes,)
        return (self.width,) if self.width else ()

    @property
    def version(self) -> int:
        """Version of the format."""
        return INT8_VERSION if self.dtype is CtxDtype.INT8 else CTX_VERSION

    def pack(self) -> bytes:
        """The 64 bytes."""
        fields = _FIELDS.pack(
            MAGIC,
            self.version,
            self.level,
            self.block_size,
            self.width,
            int(self.dtype),
            self.base_model.encode("utf-8"),
        )
        return (fields + _CRC.pack(zlib.crc32(fields))).ljust(HEADER_BYTES, b"\0")

    @classmethod
    def unpack(cls, raw: bytes, path: Path) -> CtxHeader:
        """Reads the header back.

        Raises:
            CorruptMemoryError: the bytes are no ``.ctx`` header, or one of them was changed.
            MemoryVersionError: an intact header of a version this code does not know.
        """
        if len(raw) < HEADER_BYTES:
            raise CorruptMemoryError(
                f"the file ends inside its {HEADER_BYTES}-byte header", path=path, offset=len(raw)
            )
        magic, version, level, block_size, width, dtype, name = _FIELDS.unpack_from(raw)
        if magic != MAGIC:
            raise CorruptMemoryError(
                f"not a .ctx file: it starts with 0x{magic:08X}, not 0x{MAGIC:08X}",
                path=path,
                offset=0,
            )
        (stored_crc,) = _CRC.unpack_from(raw, _FIELDS.size)
        if stored_crc != zlib.crc32(raw[: _FIELDS.size]):
            raise CorruptMemoryError("the header's checksum is wrong", path=path, offset=0)
        if not CTX_VERSION <= version <= INT8_VERSION:
            raise MemoryVersionError(
                f"{path}: .ctx version {version}, this MegaContext reads versions {CTX_VERSION} "
                f"to {INT8_VERSION}; use the version of MegaContext that wrote it, or a newer one"
            )
        padding_start = _FIELDS.size + _CRC.size
        if any(raw[padding_start:HEADER_BYTES]):
            raise CorruptMemoryError(
                "the header's padding is not zero", path=path, offset=padding_start
            )
        try:
            header = cls(level, block_size, width, CtxDtype(dtype), name.rstrip(b"\0").decode())
            if header.version != version:
                raise ConfigError(f"{header.dtype.name} records in a file of version {version}")
            return header
        except (ValueError, ConfigError) as error:
            raise CorruptMemoryError(
                f"the header makes no sense: {error}", path=path, offset=0
            ) from None
