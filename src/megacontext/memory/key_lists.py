"""Inverted lists over lens keys: what faiss does here, and nothing else."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Final, Literal, Self

import torch
from torch import Tensor

from megacontext.errors import InvariantError
from megacontext.memory.key_search import KEYS_PER_CHUNK, ReadKeys

FEWEST_KEYS: Final = 16
"""With fewer, there is nothing to find the 16 values of a 4-bit number from."""

_SAMPLE_PER_LIST: Final = 64
_SMALLEST_SAMPLE: Final = 16_384
Codes = Literal["pq4", "fp16"]

_LARGEST_FP16: Final = 65_504.0


def find_faiss() -> Any | None:
    """The module ``faiss``, or ``None`` where the extra ``ann`` is not installed."""
    try:
        return importlib.import_module("faiss")
    except ImportError:
        return None


def list_count(n_keys: int) -> int:
    """Lists for a number of keys: the power of 2 closest to a quarter of its square root."""
    return max(1, 1 << max(0, round(math.log2(max(1, n_keys)) / 2 - 2)))


class KeyLists:
    """Keys in inverted lists (Sivic and Zisserman, "Video Google", 2003), as faiss keeps them.

    A key lies in the list of the centroid that it has the largest inner product with; a search
    looks into the lists closest to the query. Keys are numbered in the order they were added. They
    are kept as float16 (``IVF…,SQfp16``), or every two numbers as one of 16 pairs
    (``IVF…,PQ…x4fs``; Jégou et al., "Product Quantization for Nearest Neighbor Search", 2011, and
    André et al., "Quicker ADC", arXiv 1812.09162): a quarter of a byte per number.

    Args:
        faiss: the module (arXiv 2401.08281).
        index: its index.
        trained_on: keys that there were when the centroids were found.
        threads: threads at work; results may depend on their number.
    """

    def __init__(self, faiss: Any, index: Any, trained_on: int, threads: int) -> None:
        self._faiss = faiss
        self._index = index
        self.trained_on = trained_on
        self._threads = threads

    @classmethod
    def train(
        cls,
        faiss: Any,
        read: ReadKeys,
        n_keys: int,
        codes: Codes,
        threads: int,
        at_once: int = KEYS_PER_CHUNK,
    ) -> Self:
        """Finds centroids and codes from an evenly spaced sample of the keys; adds none.

        Args:
            faiss: the module.
            read: reads keys.
            n_keys: keys there are, at least :data:`FEWEST_KEYS`.
            codes: what is kept of a key.
            threads: threads at work, now and later.
            at_once: keys to read at a time.
        """
        lists = list_count(n_keys)
        sample_size = max(_SMALLEST_SAMPLE, lists * _SAMPLE_PER_LIST)
        sample = _spread(read, n_keys, min(n_keys, sample_size), at_once)
        index = _empty_index(faiss, sample.shape[1], lists, codes)
        with _threads(faiss, threads):
            index.train(_numbers(sample))
        return cls(faiss, index, n_keys, threads)

    @classmethod
    def load(
        cls, faiss: Any, read: Callable[[int], bytes], trained_on: int, threads: int
    ) -> Self | None:
        """Lists that :meth:`save` wrote; ``None`` where this faiss makes nothing of them.

        Args:
            faiss: the module.
            read: reads the next bytes, at most as many as it is told. They must be known to be
                those that were written: faiss trusts them.
            trained_on: as it was when they were written.
            threads: threads at work.
        """
        try:
            index = faiss.read_index(faiss.PyCallbackIOReader(read))
        except RuntimeError:
            return None
        kinds = (faiss.IndexIVFScalarQuantizer, faiss.IndexIVFPQFastScan)
        fits = isinstance(index, kinds) and index.is_trained
        if not fits or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            return None
        return cls(faiss, index, trained_on, threads)

    @property
    def codes(self) -> Codes:
        """What is kept of a key."""
        return "pq4" if isinstance(self._index, self._faiss.IndexIVFPQFastScan) else "fp16"

    @property
    def covered(self) -> int:
        """Keys that were added: those before this index."""
        return int(self._index.ntotal)

    @property
    def width(self) -> int:
        """Numbers per key."""
        return int(self._index.d)

    @property
    def lists(self) -> int:
        """How many lists there are."""
        return int(self._index.nlist)

    def add(self, read: ReadKeys, stop: int, at_once: int = KEYS_PER_CHUNK) -> None:
        """Adds the keys from :attr:`covered` to ``stop``, a bounded number at a time."""
        with _threads(self._faiss, self._threads):
            for first in range(self.covered, stop, at_once):
                self._index.add(_numbers(read(first, min(stop, first + at_once))))
        if self.covered != stop:
            raise InvariantError(f"key index: it has {self.covered} keys, expected {stop}")

    def find(self, queries: Tensor, k: int, n: int, probe_share: float) -> Tensor:
        """Keys among the first ``n`` that are close to any query.

        Args:
            queries: ``[q, key_width]``.
            k: keys per query, at most.
            n: only keys before this one count.
            probe_share: share of the lists that each query looks into.

        Returns:
            Indices ``[m]`` int64, in ascending order, each once.
        """
        faiss = self._faiss
        # Both objects must outlive the search: faiss holds no reference to them.
        selected = faiss.IDSelectorRange(0, n)
        options = faiss.SearchParametersIVF(
            sel=selected, nprobe=math.ceil(probe_share * self.lists)
        )
        with _threads(faiss, self._threads):
            _, found = self._index.search(_numbers(queries), min(k, n), params=options)
        index = torch.from_numpy(found).flatten().unique()
        return index[index >= 0]

    def save(self, write: Callable[[bytes], int]) -> None:
        """Hands all bytes to ``write``, piece by piece; it returns how many it took.

        Raises:
            RuntimeError: it took fewer than it was given.
        """
        self._faiss.write_index(self._index, self._faiss.PyCallbackIOWriter(write))


def _empty_index(faiss: Any, width: int, lists: int, codes: Codes) -> Any:
    # Both keep the keys themselves, not what they differ from their centroid by.
    if codes == "fp16":
        kind, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        quantizer = faiss.IndexFlatIP(width)
        index = faiss.IndexIVFScalarQuantizer(quantizer, width, lists, kind, metric, False)
    else:
        parts, bits = width // 2 if width % 2 == 0 else width, 4
        quantizer, metric = faiss.IndexFlatIP(width), faiss.METRIC_INNER_PRODUCT
        index = faiss.IndexIVFPQFastScan(quantizer, width, lists, parts, bits, metric)
        index.by_residual = False
        index.pq.cp.seed, index.pq.cp.min_points_per_centroid = 0, 1
    index.cp.seed = 0
    index.cp.min_points_per_centroid = 1  # or faiss warns of small samples on standard error
    return index


def _spread(read: ReadKeys, n_keys: int, count: int, at_once: int) -> Tensor:
    """``count`` of the keys at even distances, read in order."""
    places = torch.arange(count) * n_keys // count
    parts: list[Tensor] = []
    for first in range(0, n_keys, at_once):
        stop = min(n_keys, first + at_once)
        here = places[torch.searchsorted(places, first) : torch.searchsorted(places, stop)]
        parts.append(read(first, stop)[here - first])
    return torch.cat(parts)


def _numbers(vectors: Tensor) -> Any:
    """Vectors as faiss takes them; what float16 cannot hold is as large as can be."""
    limited = vectors.detach().to("cpu", torch.float32).clamp(-_LARGEST_FP16, _LARGEST_FP16)
    return limited.contiguous().numpy()


@contextmanager
def _threads(faiss: Any, count: int) -> Generator[None]:
    """Lets faiss use this many threads inside the block."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
