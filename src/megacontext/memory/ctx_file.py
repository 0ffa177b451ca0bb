"""A ``.ctx`` file: a header, then fixed-width records that map straight into a tensor."""

from __future__ import annotations

import mmap
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megacontext.errors import CorruptMemoryError, InputError, InvariantError
from megacontext.memory.ctx_header import HEADER_BYTES, CtxDtype, CtxHeader
from megacontext.memory.number_formats import dequantize
from megacontext.memory.resident import ResidentLimit
from megacontext.memory.storage_io import FILE_MODE, read_all, storing, write_all

_NUMPY_DTYPES: Final = {
    CtxDtype.U32: np.dtype("<i4"),
    CtxDtype.FP16: np.dtype("<f2"),
    CtxDtype.BF16: np.dtype("<u2"),
    CtxDtype.INT8: np.dtype("u1"),
}
_READ_BYTES: Final = 1 << 20

# Without it Linux refuses a private mapping larger than its free memory, although none of it is
# ever written; Python only names the constant from 3.13 on.
_NO_RESERVE: Final[int] = getattr(
    mmap, "MAP_NORESERVE", 0x4000 if sys.platform.startswith("linux") else 0
)


class CtxFile:
    """One open ``.ctx`` file.

    The number of records is what the owner says it is (the catalog's committed length), not what
    the file's size suggests: bytes behind it are a torn append and never read.

    A limit to what stays in RAM of its map, and of others', is told of everything that is read.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        header: CtxHeader,
        length: int,
        limit: ResidentLimit | None = None,
    ) -> None:
        self.path = path
        self.header = header
        self._descriptor = descriptor
        self._length = length
        self._limit = limit
        self._map: mmap.mmap | None = None
        self._view: Tensor | None = None

    @classmethod
    def create(
        cls, path: Path, header: CtxHeader, *, limit: ResidentLimit | None = None
    ) -> CtxFile:
        """Makes an empty file, readable and writable by its owner only.

        Raises:
            StorageFullError, ReadOnlyMemoryError, MemoryStoreError: the file cannot be written; it
                is removed again.
        """
        with storing(path, "create"):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
            descriptor = os.open(path, flags, FILE_MODE)
            try:
                write_all(descriptor, memoryview(header.pack()), 0)
            except BaseException:
                os.close(descriptor)
                path.unlink(missing_ok=True)
                raise
        return cls(path, descriptor, header, 0, limit)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        writable: bool = False,
        length: int | None = None,
        limit: ResidentLimit | None = None,
    ) -> CtxFile:
        """Opens a file of which ``length`` records count (all complete ones by default).

        Raises:
            CorruptMemoryError: the file is missing, its header is damaged, or it is too short.
            MemoryVersionError: its version is unknown.
            MemoryStoreError: it cannot be opened.
        """
        with storing(path, "open"):
            try:
                descriptor = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
            except FileNotFoundError:
                raise CorruptMemoryError("the file is missing", path=path) from None
        try:
            with storing(path, "read"):
                header = CtxHeader.unpack(read_all(descriptor, HEADER_BYTES, 0), path)
            file = cls(path, descriptor, header, 0, limit)
            file.extend_to(file.stored_records() if length is None else length)
        except BaseException:
            os.close(descriptor)
            raise
        return file

    @property
    def length(self) -> int:
        """Records that count."""
        return self._length

    def stored_bytes(self) -> int:
        """Size of the file on disk, in bytes."""
        with storing(self.path, "examine"):
            return os.fstat(self._descriptor).st_size

    def stored_records(self) -> int:
        """Complete records on disk, whether they count or not."""
        return max(0, self.stored_bytes() - HEADER_BYTES) // self.header.record_bytes

    def offset(self, index: int) -> int:
        """Byte at which record ``index`` starts."""
        return HEADER_BYTES + index * self.header.record_bytes

    def extend_to(self, length: int) -> None:
        """Lets ``length`` records count, which somebody else has written.

        Raises:
            CorruptMemoryError: the file does not have that many.
        """
        stored = self.stored_records()
        if stored < length:
            raise CorruptMemoryError(
                f"the file holds {stored} complete records, the catalog has {length}",
                path=self.path,
                level=self.header.level,
                index=stored,
                offset=self.offset(stored),
            )
        self._length = length

    def append(self, records: npt.NDArray[Any]) -> memoryview:
        """Writes records behind the last one; they count at once, but are not synced.

        Args:
            records: ``[n]`` uint32/int32 token ids, or ``[n, width]`` float16, or bfloat16 as
                uint16, or ``[n, record_bytes]`` uint8 where they are int8.

        Returns:
            The bytes written (for a checksum).

        Raises:
            InvariantError: the shape or number format is not the file's.
            StorageFullError, MemoryStoreError: the write failed; ``length`` has not changed, but
                part of the records may lie behind it (see :meth:`truncate`).
        """
        shape, dtype = self.header.record_shape, _NUMPY_DTYPES[self.header.dtype]
        if records.shape[1:] != shape or records.ndim == 0 or not _same_format(records, dtype):
            raise InvariantError(
                f"{self.path.name}: records of shape {records.shape} and dtype {records.dtype} "
                f"do not fit into a file of width {self.header.width} and {self.header.dtype.name}"
            )
        raw = memoryview(np.ascontiguousarray(records).reshape(-1).view(np.uint8).data)
        with storing(self.path, "append to"):
            write_all(self._descriptor, raw, self.offset(self._length))
        self._length += records.shape[0]
        return raw

    def truncate(self, length: int) -> None:
        """Cuts the file after ``length`` records.

        Raises:
            InvariantError: more records are asked for than there are.
            MemoryStoreError: the file cannot be cut.
        """
        if not 0 <= length <= self._length:
            raise InvariantError(
                f"{self.path.name}: cannot cut {self._length} records to {length} of them"
            )
        with storing(self.path, "truncate"):
            os.ftruncate(self._descriptor, self.offset(length))
        if length < self._length:
            self._view = self._map = None
        self._length = length

    def fsync(self) -> None:
        """Waits until the file is on the disk.

        Raises:
            StorageFullError, MemoryStoreError: it cannot be brought there.
        """
        with storing(self.path, "sync"):
            os.fsync(self._descriptor)

    def map(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Records ``start`` to ``stop``, without copying them unless they are int8.

        Returns:
            ``[stop - start]`` int32 token ids, or ``[stop - start, width]`` float16 or bfloat16, on
            the memory map of the file. The map is private: writing to the tensor would not change
            the file. Treat it as read-only. Int8 records are read as new float32 numbers.

        Raises:
            InputError: the range does not lie within the file.
        """
        end = self._length if stop is None else stop
        if not 0 <= start <= end <= self._length:
            raise InputError(
                f"{self.path.name}: no records {start} to {end}; it has {self._length} of them"
            )
        records = self._mapped(end)[start:end]
        if self._limit is not None and self._map is not None and start < end:
            self._limit.announce(self._map, self.offset(start), self.offset(end))
        return self._numbers(records)

    def take(self, index: Tensor) -> Tensor:
        """Records at ``index`` ``[m]`` int64, each from 0 on and within the file, as :meth:`map`
        gives them; no other is read.
        """
        records = self._mapped(self._length)
        if self._limit is None or self._map is None:
            return self._numbers(records[index])
        taken = records.new_empty((len(index), *records.shape[1:]))
        size = self.header.record_bytes
        for here in self._limit.in_pieces(self._map, HEADER_BYTES + index * size, size):
            taken[here] = records[index[here]]
        return self._numbers(taken)

    def crc32(self, start: int, count: int) -> tuple[int, int]:
        """Checksum of ``count`` records from ``start`` on, read in small pieces.

        Returns:
            The CRC32 and the number of bytes it covers (fewer than asked for if the file ends).
        """
        checksum = n_bytes = 0
        for piece in self._pieces(start, count):
            checksum = zlib.crc32(piece, checksum)
            n_bytes += len(piece)
        return checksum, n_bytes

    def close(self) -> None:
        """Closes the file; tensors mapped from it stay usable."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        self._view = self._map = None

    def _pieces(self, start: int, count: int) -> Iterator[bytes]:
        offset, left = self.offset(start), count * self.header.record_bytes
        with storing(self.path, "read"):
            while left > 0:
                piece = read_all(self._descriptor, min(left, _READ_BYTES), offset)
                if not piece:
                    return
                yield piece
                offset += len(piece)
                left -= len(piece)

    def _numbers(self, records: Tensor) -> Tensor:
        return dequantize(records) if self.header.dtype is CtxDtype.INT8 else records

    def _mapped(self, length: int) -> Tensor:
        """The map of the file, with at least ``length`` records."""
        if self._view is None or self._view.shape[0] < length:
            self._view = self._map_all()
        return self._view

    def _map_all(self) -> Tensor:
        header = self.header
        shape = (self._length, *header.record_shape)
        dtype = _NUMPY_DTYPES[header.dtype]
        if self._length == 0:
            self._map = None
            return _as_tensor(np.empty(shape, dtype), header.dtype)
        self.extend_to(self._length)
        with storing(self.path, "map"):
            mapped = mmap.mmap(
                self._descriptor,
                self.offset(self._length),
                flags=mmap.MAP_PRIVATE | _NO_RESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
        self._map = mapped
        records = np.frombuffer(mapped, dtype, count=-1, offset=HEADER_BYTES)
        return _as_tensor(records.reshape(shape), header.dtype)


def _same_format(records: npt.NDArray[Any], dtype: np.dtype[Any]) -> bool:
    if dtype == np.dtype("<i4"):
        return records.dtype in (dtype, np.dtype("<u4"))
    return records.dtype == dtype


def _as_tensor(records: npt.NDArray[Any], dtype: CtxDtype) -> Tensor:
    tensor = torch.from_numpy(records)  # pyright: ignore[reportUnknownMemberType]
    return tensor.view(torch.bfloat16) if dtype is CtxDtype.BF16 else tensor
