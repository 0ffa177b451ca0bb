"""Every exception MegaContext raises on purpose, as one tree.

A message says what is wrong, where, and what to do about it, in one line. The command line prints
that line and exits with :attr:`MegaContextError.exit_code`; a traceback means a bug in MegaContext.
"""

from __future__ import annotations

from pathlib import Path


class MegaContextError(Exception):
    """Base of all errors that a caller can cause and can act upon."""

    exit_code: int = 2


class ConfigError(MegaContextError):
    """A configuration key is unknown, or its value lies outside the allowed range."""


class InputError(MegaContextError):
    """A text, file, token id or command-line argument cannot be used."""


class InvariantError(MegaContextError):
    """An invariant of the working context or memory does not hold; never repaired silently."""


class ModelError(MegaContextError):
    """A base model, tokenizer or checkpoint cannot be used."""


class ModelNotFoundError(ModelError):
    """No model lies under the given folder, hub id or bundled name."""


class CheckpointError(ModelError):
    """A checkpoint is missing, damaged, or was made for another model."""


class DataError(MegaContextError):
    """A data set is missing, damaged, or belongs to another model or tokenizer."""


class TrainingError(MegaContextError):
    """Training cannot go on, for example because the loss is no longer finite."""


class MemoryStoreError(MegaContextError):
    """A memory directory cannot be used as asked."""


class MemoryNotFoundError(MemoryStoreError):
    """There is no memory at the given path."""


class MemoryExistsError(MemoryStoreError):
    """A memory would be created where something lies already."""


class MemoryLockedError(MemoryStoreError):
    """Another process has the memory open for writing."""


class MemoryMismatchError(MemoryStoreError):
    """The memory was made with another base model, tokenizer, gist version or block size."""


class MemoryVersionError(MemoryStoreError):
    """The memory's file format is newer than this version of MegaContext can read."""


class ReadOnlyMemoryError(MemoryStoreError):
    """The memory, or the file system it lies on, does not accept writes."""


class StorageFullError(MemoryStoreError):
    """The disk is full; everything committed before is still there."""


class CorruptMemoryError(MemoryStoreError):
    """A file of the memory does not hold what its catalog promises.

    Args:
        reason: what was found, in a few words.
        path: the file.
        level: level of the tree the file belongs to (0: tokens), where known.
        index: record within the level at which the damage starts, where known.
        offset: byte within the file at which the damage starts, where known.
    """

    def __init__(
        self,
        reason: str,
        *,
        path: Path | str,
        level: int | None = None,
        index: int | None = None,
        offset: int | None = None,
    ) -> None:
        self.reason = reason
        self.path = Path(path)
        self.level = level
        self.index = index
        self.offset = offset
        place = ", ".join(
            f"{name} {value}"
            for name, value in (("level", level), ("index", index), ("byte", offset))
            if value is not None
        )
        where = f"{self.path.name} ({place})" if place else self.path.name
        super().__init__(
            f"{where}: {reason}. Restore the memory from a copy, or run "
            f"`megacontext verify {self.path.parent}` for the extent of the damage; `megacontext "
            "repair` makes anew all but the tokens"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (
            _corrupt_memory_error,
            (self.reason, self.path, self.level, self.index, self.offset),
        )


def _corrupt_memory_error(
    reason: str, path: Path, level: int | None, index: int | None, offset: int | None
) -> CorruptMemoryError:
    return CorruptMemoryError(reason, path=path, level=level, index=index, offset=offset)
