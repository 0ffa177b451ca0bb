"""The gist tree on disk: one directory, one writer, any number of readers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from megacontext.closing import Closing
from megacontext.errors import (
    InputError,
    InvariantError,
    MemoryStoreError,
    ReadOnlyMemoryError,
)
from megacontext.memory.catalog import Catalog
from megacontext.memory.catalog_rows import Snapshot, SourceRange
from megacontext.memory.file_set import FileSet, header_for
from megacontext.memory.identity import (
    GistDtype,
    MemoryIdentity,
    Source,
    SourcePart,
    SourceRecord,
)
from megacontext.memory.key_index_file import remove_lists
from megacontext.memory.lock import WriterLock
from megacontext.memory.opening import (
    acknowledge,
    acknowledged,
    check_openable,
    create_directory,
    show_latest,
)
from megacontext.memory.reading import CLOSED, ReadableMemory
from megacontext.memory.rebuild import GistMaker, Rebuild
from megacontext.memory.records import append_records
from megacontext.memory.resident import ResidentLimit
from megacontext.memory.verify import VerifyReport, verify_catalog


class Memory(ReadableMemory, Closing):
    """A history of tokens, and the gists of all its complete spans.

    Level 0 are the tokens; gist ``i`` of level ``l`` stands for tokens ``i * K**l`` to
    ``(i + 1) * K**l``. Tensors come straight from memory-mapped files: reading is free of copies,
    and they stay valid when the memory grows or is closed.

    One object is for one thread at a time. Open the memory once more for another reader.
    """

    def __init__(
        self,
        path: Path,
        catalog: Catalog,
        files: FileSet,
        lock: WriterLock | None,
        expect: MemoryIdentity | None,
        snapshot: Snapshot,
    ) -> None:
        super().__init__(path, catalog, files, snapshot)
        self._lock = lock
        self._expect = expect
        self._pending: dict[int, Source] = {}
        self._next_source = catalog.max_source_id() + 1

    @classmethod
    def create(
        cls, path: Path | str, identity: MemoryIdentity, *, resident_mb: int | None = None
    ) -> Self:
        """Makes an empty memory and opens it for writing.

        Args:
            path: its directory.
            identity: what it is made with.
            resident_mb: as of :meth:`open`.

        Raises:
            InputError: ``resident_mb`` is not allowed.
            MemoryExistsError: something lies at ``path`` already.
            StorageFullError, ReadOnlyMemoryError, MemoryStoreError: it cannot be written.
        """
        target = Path(path)
        ResidentLimit.of(resident_mb)  # before anything is made
        create_directory(target, identity)
        return cls.open(target, "a", resident_mb=resident_mb)

    @classmethod
    def open(
        cls,
        path: Path | str,
        mode: Literal["r", "a"] = "r",
        *,
        expect: MemoryIdentity | None = None,
        resident_mb: int | None = None,
    ) -> Self:
        """Opens a memory as of its last commit.

        Args:
            path: its directory.
            mode: ``"r"`` to read, ``"a"`` to read and append; one writer at a time.
            expect: what the memory must have been made with.
            resident_mb: most MiB of its files' maps that stay in RAM, 16 or more; ``None``: as the
                system likes. See :class:`~.resident.ResidentLimit`.

        Raises:
            InputError: ``mode`` is neither, or ``resident_mb`` is not allowed.
            MemoryNotFoundError: there is none.
            MemoryMismatchError: it was made with something else than ``expect``.
            MemoryVersionError: its format is unknown.
            MemoryLockedError: ``mode`` is ``"a"`` and somebody else has it open for writing.
            ReadOnlyMemoryError: ``mode`` is ``"a"`` and it cannot be written to.
            CorruptMemoryError: its files do not hold what its catalog says.
        """
        directory, limit = Path(path), ResidentLimit.of(resident_mb)
        check_openable(directory, mode)
        writable = mode == "a"
        lock = WriterLock.acquire(directory) if writable else None
        catalog: Catalog | None = None
        files = FileSet(directory, writable=writable, limit=limit)
        try:
            note = acknowledged(directory)
            catalog = Catalog.open(directory, writable=writable)
            snapshot = show_latest(catalog, files, directory, expect, note)
            if writable:
                files.trim()
                acknowledge(directory, snapshot)
            return cls(directory, catalog, files, lock, expect, snapshot)
        except BaseException:
            files.close()
            if catalog is not None:
                catalog.close()
            if lock is not None:
                lock.release()
            raise

    @staticmethod
    def verify_path(path: Path | str) -> VerifyReport:
        """Verifies a memory that may be too damaged to be opened.

        Raises:
            MemoryNotFoundError: there is none.
            CorruptMemoryError: not even its catalog can be read.
        """
        directory = Path(path)
        check_openable(directory, "r")
        catalog = Catalog.open(directory, writable=False)
        try:
            return verify_catalog(catalog, directory)
        finally:
            catalog.close()

    @property
    def writable(self) -> bool:
        """Whether it is open for writing."""
        return self._lock is not None

    def append(
        self,
        tokens: Tensor,
        gists: Mapping[int, Tensor],
        keys: Mapping[int, Tensor],
        fidelity: Mapping[int, Tensor] | None = None,
        block_texts: Sequence[str] = (),
        source_id: int | None = None,
        parts: Sequence[SourcePart] = (),
    ) -> tuple[int, int]:
        """Commits tokens together with the gists of every span they complete, or nothing at all.

        Args:
            tokens: ``[n]`` int64 or int32 token ids.
            gists: per level ``[m, gist_width]``, where ``m`` spans of that level become complete.
            keys: per level ``[m, key_width]``; empty if the memory stores none.
            fidelity: per level ``[m]``; NaN is stored where it is not given.
            block_texts: text of each newly complete block, for :meth:`search_blocks`; or none.
            source_id: number from :meth:`begin_source`; the tokens extend and complete that source.
            parts: instead of it, for tokens of several sources, or of one that is to go on.

        Returns:
            The range of tokens appended.

        Raises:
            InvariantError: gists, keys or texts do not match the completed spans, or parts the
                tokens; or a source has tokens that are not the newest ones.
            InputError: a token id is out of range, a number is not finite, the source is unknown.
            StorageFullError, MemoryStoreError: the disk failed; the memory is as it was before.
        """
        self._check_writable()
        records = append_records(
            self.identity, self.n_tokens, tokens, gists, keys, fidelity, block_texts
        )
        start, stop = self.n_tokens, self.n_tokens + tokens.shape[0]
        if start == stop:
            return start, stop
        sources = self._source_ranges(parts or [SourcePart(source_id, stop - start)], start, stop)
        try:
            for kind, level, values in records:
                if self._files.get(kind, level) is None:
                    self._files.create(kind, level, header_for(self.identity, kind, level))
                self._files.append(kind, level, values)
            self._catalog.commit_append(
                self.generation + 1,
                stop,
                self._files.sync(),
                texts=block_texts,
                first_block=self.count(1),
                sources=sources,
            )
            self._show()
        except BaseException:
            self._recover()
            raise
        acknowledge(self.path, self._snapshot)
        for source in sources:
            self._pending.pop(source.id, None)
        return start, stop

    def begin_source(self, source: Source) -> int:
        """Announces a source; it is committed with the first tokens appended to it.

        Returns:
            Its number, for :meth:`append`.

        Raises:
            ReadOnlyMemoryError: the memory is open for reading only.
            InputError: a text of the source is no Unicode, or its time is not finite.
        """
        self._check_writable()
        source.check()
        source_id = self._next_source
        self._next_source += 1
        self._pending[source_id] = source
        return source_id

    def replace_gists(
        self,
        make: GistMaker,
        *,
        gist_version: str,
        gist_width: int | None = None,
        key_width: int | None = None,
        gist_dtype: GistDtype | None = None,
    ) -> None:
        """Puts new gists, keys and fidelities in the place of all old ones, in one commit.

        The new files grow beside the old ones, in constant memory; until the commit everything
        reads the old ones. Tokens, sources and the lexical index stay as they are.

        Args:
            make: called with each level from 1 on and with a function that reads what its gists
                are made from (tokens, then the new gists of the level below); yields batches.
            gist_version: version of the GistNet at work.
            gist_width: its gists' width, if it changes.
            key_width: the lens keys' width, if it changes.
            gist_dtype: number format, if it changes.

        Raises:
            InvariantError: the number or shape of the gists is wrong; nothing has changed.
            StorageFullError, MemoryStoreError: the disk failed; nothing has changed.
        """
        self._check_writable()
        changes = {"gist_width": gist_width, "key_width": key_width, "gist_dtype": gist_dtype}
        given: dict[str, Any] = {key: new for key, new in changes.items() if new is not None}
        identity = dataclasses.replace(self.identity, gist_version=gist_version, **given)
        generation = self.generation + 1
        rebuild = Rebuild(self.path, identity, self.n_tokens, generation, self._files.limit)
        try:
            updates = rebuild.write(self.tokens, make)
            self._catalog.commit_replacement(generation, self.n_tokens, identity, updates)
            self._expect = None
            self._show()
        except BaseException:
            self._recover(rebuild)
            raise
        finally:
            rebuild.close()
        acknowledge(self.path, self._snapshot)
        # What cannot be removed now is unknown to the catalog and goes when a writer next opens.
        with contextlib.suppress(MemoryStoreError):
            self._files.trim()
        # Nor would an index over the old keys be taken for one over the new.
        with contextlib.suppress(MemoryStoreError):
            remove_lists(self.path)

    def restore_sources(self, sources: Sequence[SourceRecord]) -> None:
        """Records sources of tokens that are there already, in one commit.

        Args:
            sources: with the numbers, tokens and times that they had in another memory.

        Raises:
            InvariantError: the memory has sources of its own, or lacks tokens of these.
            StorageFullError, MemoryStoreError: the disk failed; nothing has changed.
        """
        self._check_writable()
        if self.sources() or any(source.end > self.n_tokens for source in sources):
            raise InvariantError(f"{self.path}: these sources do not belong to its tokens")
        try:
            self._catalog.commit_sources(self.generation + 1, self.n_tokens, sources)
            self._show()
        except BaseException:
            self._recover()
            raise
        self._next_source = self._catalog.max_source_id() + 1
        acknowledge(self.path, self._snapshot)

    def refresh(self) -> bool:
        """Shows a reader the last commit.

        Returns:
            Whether there was a newer one.

        Raises:
            MemoryMismatchError: the gists were rebuilt and are no longer what ``open`` expected.
            CorruptMemoryError: the files do not hold what the catalog says.
        """
        self._check_open()
        if self.writable or self._catalog.generation() == self.generation:
            return False
        self._show()
        return True

    def verify(self) -> VerifyReport:
        """Reads every committed byte back and compares it with the catalog's checksums."""
        self._check_open()
        return verify_catalog(self._catalog, self.path)

    def close(self) -> None:
        """Closes the memory and lets the next writer in. Tensors read from it stay usable."""
        if self._unusable == CLOSED:
            return
        self._unusable = CLOSED
        try:
            self._files.close()
            self._catalog.lexical.close()
            self._catalog.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def _source_ranges(
        self, parts: Sequence[SourcePart], start: int, stop: int
    ) -> list[SourceRange]:
        """Where each source's tokens lie among those from ``start`` to ``stop``."""
        numbers = [part.source_id for part in parts if part.source_id is not None]
        counts = [part.count for part in parts]
        if sum(counts) != stop - start or min(counts) < 1 or len(set(numbers)) < len(numbers):
            raise InvariantError(
                f"append: {stop - start} tokens given, but parts of {counts} tokens of sources "
                f"{numbers}; give each source once, with the tokens that are its own"
            )
        ranges: list[SourceRange] = []
        for part in parts:
            if part.source_id is not None:
                end = start + part.count
                ranges.append(self._source_range(part.source_id, start, end, part.more))
            start += part.count
        return ranges

    def _source_range(self, source_id: int, start: int, stop: int, more: bool) -> SourceRange:
        if source_id in self._pending:
            return SourceRange(source_id, self._pending[source_id], start, stop, True, more)
        record = self._catalog.source(source_id)
        if record is None:
            raise InputError(f"{self.path}: no source {source_id}; begin_source makes one")
        if record.end != start:
            raise InvariantError(
                f"{self.path}: source {source_id} ends at token {record.end}, the memory at "
                f"{start}; other tokens have followed it, begin a new source"
            )
        return SourceRange(source_id, record, record.start, stop, False, more)

    def _show(self) -> None:
        self._snapshot = show_latest(self._catalog, self._files, self.path, self._expect)

    def _recover(self, rebuild: Rebuild | None = None) -> None:
        """Brings files and catalog back to the last commit, whichever that turned out to be."""
        try:
            if self._catalog.roll_back() != self.generation:
                self._show()
            elif rebuild is not None:
                rebuild.discard()
            else:
                self._files.discard()
        except MemoryStoreError as error:
            self._unusable = f"an earlier failure could not be undone ({error}); open it again"

    def _check_writable(self) -> None:
        if self._unusable is not None:
            raise MemoryStoreError(f"{self.path}: the memory {self._unusable}")
        if not self.writable:
            raise ReadOnlyMemoryError(
                f"{self.path}: open for reading only; open it with mode 'a' to write"
            )
