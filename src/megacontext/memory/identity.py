"""What a memory belongs to, and where its texts came from."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Final, Literal, get_args

from megacontext.errors import ConfigError, InputError

GistDtype = Literal["fp16", "bf16", "int8"]

_U16_MAX: Final = 0xFFFF
_REBUILDABLE: Final = frozenset({"gist_version", "gist_width", "key_width", "gist_dtype"})


@dataclass(frozen=True)
class MemoryIdentity:
    """The models and sizes a memory was made with; it can only be used with the same ones.

    Args:
        base_model: name of the base model.
        tokenizer_hash: hash of its tokenizer; the stored tokens mean nothing to another one.
        gist_version: version of the GistNet that made the gists.
        block_size: tokens per block (``K``), 2 to 65535.
        gist_width: numbers per gist, 1 to 65535.
        key_width: numbers per lens key, 0 (none are stored) to 65535.
        gist_dtype: number format of gists and keys on disk; with ``int8`` keys are fp16. Whoever
            reads them need not know.

    Raises:
        ConfigError: a value is out of range.
    """

    base_model: str
    tokenizer_hash: str
    gist_version: str
    block_size: int
    gist_width: int
    key_width: int
    gist_dtype: GistDtype

    def __post_init__(self) -> None:
        for name, value, low in (
            ("block_size", self.block_size, 2),
            ("gist_width", self.gist_width, 1),
            ("key_width", self.key_width, 0),
        ):
            if not low <= value <= _U16_MAX:
                raise ConfigError(
                    f"memory identity: {name} is {value}, allowed are {low} to {_U16_MAX}"
                )
        if self.gist_dtype not in get_args(GistDtype):
            raise ConfigError(
                f"memory identity: gist_dtype is {self.gist_dtype!r}, allowed are "
                f"{', '.join(map(repr, get_args(GistDtype)))}"
            )
        if "\0" in self.base_model:
            raise ConfigError("memory identity: base_model must not contain a zero character")

    def explain_difference(self, expected: MemoryIdentity) -> str | None:
        """Says how this differs from what is expected and what to do; ``None`` if it does not.

        The number format may differ: gists of any are read as floats.
        """
        differing = [
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(expected, field.name)
        ]
        if {"gist_dtype"}.issuperset(differing):
            return None
        listed = ", ".join(
            f"{name} is {getattr(self, name)!r}, expected {getattr(expected, name)!r}"
            for name in differing
        )
        if _REBUILDABLE.issuperset(differing):
            return f"{listed}; `megacontext regist` rebuilds the gists from the tokens kept here"
        if "tokenizer_hash" in differing:
            return f"{listed}; its tokens cannot be read by another tokenizer: make a new memory"
        return (
            f"{listed}; open it with the model and block size it was made with, or make a new one"
        )


@dataclass(frozen=True)
class Source:
    """Where a text came from.

    Args:
        uri: file, address or name.
        media_type: MIME type.
        sha256: hash of the original bytes, where known.
        author: who wrote it, where known.
        created: when it was written, in seconds since 1970, where known.
        tags: free labels.
    """

    uri: str
    media_type: str = "text/plain"
    sha256: str = ""
    author: str = ""
    created: float | None = None
    tags: tuple[str, ...] = ()

    def check(self) -> None:
        """Refuses what no catalog can hold.

        Raises:
            InputError: a text has unpaired surrogates, or the time is not finite.
        """
        for text in (self.uri, self.media_type, self.sha256, self.author, *self.tags):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InputError(
                    f"source {text!r}: not Unicode text; write it in your terminal's encoding"
                ) from None
        if self.created is not None and not math.isfinite(self.created):
            raise InputError(f"source {self.uri!r}: its time is {self.created}; leave it out")


@dataclass(frozen=True, kw_only=True)
class SourceRecord(Source):
    """A source as the memory keeps it.

    Args:
        id: number of the source within the memory.
        start: its first token.
        end: the token behind its last one.
        ingested_at: when its first token was committed, in seconds since 1970.
        complete: whether its last token is in; ``False`` where it was cut off, see
            :class:`SourcePart`.
    """

    id: int
    start: int
    end: int
    ingested_at: float
    complete: bool = True


@dataclass(frozen=True)
class SourcePart:
    """Consecutive tokens of one append that come from one source.

    Args:
        source_id: the source's number, or ``None`` for tokens without any.
        count: how many tokens, at least 1.
        more: whether more of the source is to follow. Until it does the source is incomplete;
            an append that ends it also ends incomplete sources with its URI and SHA-256, which are
            earlier stretches of the same text.
    """

    source_id: int | None
    count: int
    more: bool = False
