"""A limit to the bytes of memory-mapped files that stay in RAM."""

from __future__ import annotations

import contextlib
import mmap
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Final, Self

import torch
from torch import Tensor

from megacontext.errors import InputError

LEAST_RESIDENT_MB: Final = 16
"""Below it, what a single search of keys compares at a time would not fit."""

MOST_RESIDENT_MB: Final = 1 << 20

WINDOW_BYTES: Final = 1 << 21
"""One access may bring in so much of a file: the system maps a whole folio of its page cache, which
is aligned and, with pages of 4 KiB, no larger than this."""

_DONT_NEED: Final[int | None] = getattr(mmap, "MADV_DONTNEED", None)


class ResidentLimit:
    """Gives pages of mapped files back before too many of them are in RAM.

    Whoever hands out a part of a map announces it. Its windows of :data:`WINDOW_BYTES` count as
    resident from then on, read or not, so that nothing has to be asked of the system. Before there
    are too many, those that were announced longest ago are given back (``madvise`` with
    ``MADV_DONTNEED``). Their pages are clean: reading such a place again, also through a tensor
    that was handed out before, brings the same bytes back from the page cache or the disk. A
    reading like that is not counted; and what is announced at once and exceeds the limit stays
    until the next announcement.

    On Linux pages leave at once; elsewhere the system may take its time.

    Args:
        megabytes: the limit, in MiB.

    Raises:
        InputError: it is too small or too large, or this system takes no pages back.
    """

    def __init__(self, megabytes: int) -> None:
        if not LEAST_RESIDENT_MB <= megabytes <= MOST_RESIDENT_MB:
            raise InputError(
                f"resident_mb is {megabytes}; allowed are {LEAST_RESIDENT_MB} to {MOST_RESIDENT_MB}"
            )
        if _DONT_NEED is None:
            raise InputError(
                "resident_mb: this system has no way to give mapped pages back (madvise); leave it "
                "out"
            )
        self.n_bytes = megabytes << 20
        self._most = self.n_bytes // WINDOW_BYTES
        self._windows: OrderedDict[tuple[weakref.ref[mmap.mmap], int], None] = OrderedDict()

    @classmethod
    def of(cls, megabytes: int | None) -> Self | None:
        """The limit; ``None`` where there is none."""
        return None if megabytes is None else cls(megabytes)

    def announce(self, mapped: mmap.mmap, start: int, stop: int) -> None:
        """Makes room for bytes ``start`` to ``stop`` of a map, which are going to be read."""
        self._admit(mapped, range(start // WINDOW_BYTES, -(-stop // WINDOW_BYTES)))

    def in_pieces(self, mapped: mmap.mmap, starts: Tensor, size: int) -> Iterator[Tensor]:
        """Which of many records to read at a time, so that no more comes in than may stay.

        Args:
            mapped: the map, from the first byte of its file on.
            starts: ``[m]`` int64, the byte at which each record starts.
            size: bytes of a record.

        Yields:
            Places in ``starts``, ``[p]`` int64, in the order of the file; each is in one piece.
        """
        order = starts.argsort()
        first = starts[order] // WINDOW_BYTES
        last = (starts[order] + size - 1) // WINDOW_BYTES
        _, counts = first.unique_consecutive(return_counts=True)
        done = 0
        # Half of what may stay, since a record may reach into the window behind its own.
        for part in counts.split(self._most // 2):
            end = done + int(part.sum())
            self._admit(mapped, torch.cat((first[done:end], last[done:end])).unique().tolist())
            yield order[done:end]
            done = end

    def _admit(self, mapped: mmap.mmap, windows: Iterable[int]) -> None:
        """Counts windows as resident, each given once, and gives others back for them."""
        asked = [(weakref.ref(mapped), window) for window in windows]
        for place in asked:
            self._windows.pop(place, None)
        while self._windows and len(self._windows) + len(asked) > self._most:
            (other, window), _ = self._windows.popitem(last=False)
            _give_back(other(), window)
        self._windows.update(dict.fromkeys(asked))


def _give_back(mapped: mmap.mmap | None, window: int) -> None:
    """Lets the pages of a window go; there is nothing to do where the whole map is gone."""
    if mapped is None or _DONT_NEED is None:
        return
    start = window * WINDOW_BYTES
    # Refused where the program has locked all its pages in RAM, which is its own decision.
    with contextlib.suppress(OSError):
        mapped.madvise(_DONT_NEED, start, min(WINDOW_BYTES, len(mapped) - start))
