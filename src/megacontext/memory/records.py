"""Tensors to records: what an append consists of, checked before a byte is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megacontext.errors import InputError, InvariantError
from megacontext.memory.catalog_rows import FileKind
from megacontext.memory.ctx_header import CtxDtype
from megacontext.memory.file_set import header_for
from megacontext.memory.identity import MemoryIdentity
from megacontext.memory.number_formats import quantize


class Records(NamedTuple):
    """Records for one file."""

    kind: FileKind
    level: int
    values: npt.NDArray[Any]


def span_count(n_tokens: int, block_size: int, level: int) -> int:
    """Complete spans of a level within ``n_tokens`` tokens."""
    return n_tokens // block_size**level


def completed_spans(n_tokens: int, n_new: int, block_size: int) -> dict[int, int]:
    """Spans of each level that ``n_new`` more tokens complete; levels without any are left out."""
    completed: dict[int, int] = {}
    level = 1
    while after := span_count(n_tokens + n_new, block_size, level):
        if new := after - span_count(n_tokens, block_size, level):
            completed[level] = new
        level += 1
    return completed


def expected_lengths(identity: MemoryIdentity, n_tokens: int) -> dict[tuple[FileKind, int], int]:
    """Records that every file of a memory with ``n_tokens`` tokens has, by kind and level."""
    expected: dict[tuple[FileKind, int], int] = {("tokens", 0): n_tokens}
    level, count = 1, n_tokens // identity.block_size
    while count:
        expected["gists", level] = expected["fidelity", level] = count
        if identity.key_width:
            expected["keys", level] = count
        level, count = level + 1, count // identity.block_size
    return expected


def append_records(
    identity: MemoryIdentity,
    n_tokens: int,
    tokens: Tensor,
    gists: Mapping[int, Tensor],
    keys: Mapping[int, Tensor],
    fidelity: Mapping[int, Tensor] | None,
    block_texts: Sequence[str],
) -> list[Records]:
    """Checks an append and converts it to records, tokens first, then level by level.

    Args:
        identity: identity of the memory.
        n_tokens: its tokens so far.
        tokens: ``[n]`` int64 or int32.
        gists: ``[m, gist_width]`` per level, for every span the tokens complete.
        keys: ``[m, key_width]`` per level; nothing where the memory stores no keys.
        fidelity: ``[m]`` per level, or nothing.
        block_texts: one per completed block, or none.

    Raises:
        InvariantError: the tree would not stay complete.
        InputError: a value cannot be stored.
    """
    records = [Records("tokens", 0, token_records(tokens))]
    completed = completed_spans(n_tokens, tokens.shape[0], identity.block_size)
    for name, given in (("gists", gists), ("keys", keys), ("fidelity", fidelity or {})):
        surplus = [level for level in given if level not in completed and len(given[level])]
        if surplus:
            raise InvariantError(
                f"append: {name} of level {surplus[0]} given, but {tokens.shape[0]} tokens after "
                f"{n_tokens} complete no span there"
            )
    for level, count in completed.items():
        level_keys = keys.get(level) if identity.key_width else None
        level_fidelity = (fidelity or {}).get(level)
        records += level_records(identity, level, gists.get(level), level_keys, level_fidelity)
        if len(records[-1].values) != count:
            raise InvariantError(
                f"append: {len(records[-1].values)} gists of level {level} given, but "
                f"{tokens.shape[0]} tokens after {n_tokens} complete {count} spans there"
            )
    if not identity.key_width and any(len(given) for given in keys.values()):
        raise InvariantError("append: keys given, but the memory stores none (its key_width is 0)")
    if block_texts and len(block_texts) != completed.get(1, 0):
        raise InvariantError(
            f"append: {len(block_texts)} block texts given, but {completed.get(1, 0)} blocks are "
            "completed; give one per block, or none"
        )
    return records


def level_records(
    identity: MemoryIdentity,
    level: int,
    gists: Tensor | None,
    keys: Tensor | None,
    fidelity: Tensor | None,
) -> list[Records]:
    """Checks and converts the gists ``[m, gist_width]`` of one level and what goes with them.

    Raises:
        InvariantError: something is missing, or its shape is not the memory's.
        InputError: a number is not finite in the memory's number format.
    """
    if gists is None:
        raise InvariantError(f"append: gists of level {level} are missing")
    count = gists.shape[0]
    values: dict[FileKind, Tensor] = {"gists": gists}
    if identity.key_width:
        if keys is None:
            raise InvariantError(f"append: keys of level {level} are missing")
        values["keys"] = keys
    records: list[Records] = []
    for kind, vectors in values.items():
        header = header_for(identity, kind, level)
        _check_shape(vectors, (count, header.width), f"{kind} of level {level}")
        records.append(Records(kind, level, _vectors(vectors, header.dtype, kind, level)))
    if fidelity is None:
        fidelity = torch.full((count,), float("nan"))
    _check_shape(fidelity, (count,), f"fidelity of level {level}")
    column = fidelity.reshape(count, 1)
    records.append(Records("fidelity", level, _vectors(column, CtxDtype.FP16, "fidelity", level)))
    return records


def token_records(tokens: Tensor) -> npt.NDArray[np.int32]:
    """Converts token ids ``[n]`` to what the file holds.

    Raises:
        InputError: they are no integers in one dimension, or one is negative or above 2**31 - 1.
    """
    if tokens.ndim != 1 or tokens.dtype not in (torch.int64, torch.int32):
        raise InputError(
            f"tokens must be one dimension of int64 or int32, not {list(tokens.shape)} "
            f"of {tokens.dtype}"
        )
    values = tokens.detach().to(device="cpu")
    if values.numel():
        low, high = (int(bound) for bound in torch.aminmax(values))
        if low < 0 or high >= 1 << 31:
            raise InputError(f"token ids run from {low} to {high}; allowed are 0 to {2**31 - 1}")
    return values.to(torch.int32).contiguous().numpy()


def _vectors(values: Tensor, dtype: CtxDtype, kind: FileKind, level: int) -> npt.NDArray[Any]:
    """Converts ``[n, width]`` numbers; fidelity may be NaN, which means that it is not known."""
    values = values.detach().to(device="cpu")
    if dtype is CtxDtype.INT8:
        values = values.float()
    converted = (
        values
        if dtype is CtxDtype.INT8
        else values.to(torch.float16 if dtype is CtxDtype.FP16 else torch.bfloat16).contiguous()
    )
    usable = ~torch.isinf(converted) if kind == "fidelity" else torch.isfinite(converted)
    if not bool(usable.all()):
        row = int((~usable).any(dim=1).nonzero()[0, 0])
        raise InputError(
            f"append: {kind} of level {level}, row {row}, holds a number that is not finite as "
            f"{dtype.name}; scale it down, or look for where it comes from"
        )
    if dtype is CtxDtype.INT8:
        return quantize(converted).numpy()
    return converted.view(torch.uint16).numpy() if dtype is CtxDtype.BF16 else converted.numpy()


def _check_shape(values: Tensor, shape: tuple[int, ...], what: str) -> None:
    if tuple(values.shape) != shape or not values.is_floating_point():
        raise InvariantError(
            f"append: {what} must be floats of shape {list(shape)}, not {values.dtype} of shape "
            f"{list(values.shape)}"
        )
