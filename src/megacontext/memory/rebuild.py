"""New gists for old tokens: written beside the old files, put in their place by one commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from megacontext.errors import InvariantError
from megacontext.memory.catalog_rows import FileUpdate
from megacontext.memory.file_set import FileSet, header_for
from megacontext.memory.identity import MemoryIdentity
from megacontext.memory.records import level_records, span_count
from megacontext.memory.resident import ResidentLimit


class GistBatch(NamedTuple):
    """Consecutive gists of one level.

    Args:
        gists: ``[m, gist_width]``.
        keys: ``[m, key_width]``; ``None`` where the memory stores none.
        fidelity: ``[m]``, or ``None`` where it is not known.
    """

    gists: Tensor
    keys: Tensor | None = None
    fidelity: Tensor | None = None


Children = Callable[[int, int], Tensor]
"""Reads what the gists of a level are made from: token ids ``[n]`` int32 below level 1, above it
the new gists ``[n, gist_width]`` of the level below, from the first index to the second."""

GistMaker = Callable[[int, Children], Iterable[GistBatch]]
"""Yields all gists of a level in order, in batches, given the level and its children."""


class Rebuild:
    """The new files of one rebuild, until they are committed or thrown away.

    Args:
        directory: the memory.
        identity: its identity once the rebuild is committed.
        n_tokens: its tokens.
        generation: number of the commit that will switch to the new files.
        limit: to what stays in RAM of their maps.
    """

    def __init__(
        self,
        directory: Path,
        identity: MemoryIdentity,
        n_tokens: int,
        generation: int,
        limit: ResidentLimit | None = None,
    ) -> None:
        self._identity = identity
        self._n_tokens = n_tokens
        self._generation = generation
        self._files = FileSet(directory, writable=True, limit=limit)

    def write(self, tokens: Children, make: GistMaker) -> list[FileUpdate]:
        """Writes every level, lowest first, and syncs the files.

        Args:
            tokens: reads the memory's tokens.
            make: makes the gists.

        Returns:
            What the catalog has to record.

        Raises:
            InvariantError: ``make`` yielded too few or too many gists, or of the wrong shape.
            StorageFullError, MemoryStoreError: the files could not be written.
        """
        level, children = 1, tokens
        while count := span_count(self._n_tokens, self._identity.block_size, level):
            self._write_level(level, count, make(level, children))
            children = self._reader(level)
            level += 1
        return self._files.sync()

    def discard(self) -> None:
        """Removes the new files."""
        self._files.discard()

    def close(self) -> None:
        """Closes the new files and keeps them."""
        self._files.close()

    def _write_level(self, level: int, count: int, batches: Iterable[GistBatch]) -> None:
        done = 0
        for batch in batches:
            done += batch.gists.shape[0]
            if done > count:
                break
            for kind, _, values in level_records(self._identity, level, *batch):
                if self._files.get(kind, level) is None:
                    header = header_for(self._identity, kind, level)
                    self._files.create(kind, level, header, self._generation)
                self._files.append(kind, level, values)
        if done != count:
            raise InvariantError(
                f"rebuild: {'more than ' if done > count else ''}{min(done, count)} gists of level "
                f"{level} given, {self._n_tokens} tokens make {count}"
            )

    def _reader(self, level: int) -> Children:
        file = self._files.get("gists", level)
        if file is None:
            raise InvariantError(f"rebuild: no gists of level {level} were written")
        return file.map
