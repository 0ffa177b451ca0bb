"""Vectors in the number format of a memory, and back.

``int8`` keeps one byte a number and one scale a vector: a bfloat16, then ``width`` integers from
-127 to 127, which stand for themselves times the scale (symmetric quantization by the largest
magnitude). What was read back is stored again as it is, bit by bit: a scale has 8 significant bits
and an integer 7, so that their product is exact, and the largest integer of a vector is always 127.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from megacontext.memory.identity import GistDtype

SCALE_BYTES: Final = 2
_LARGEST: Final = 127
# Below it a scale would lose bits; a vector as small as that is as good as zero.
_SMALLEST_SCALE: Final = 2.0**-100


def quantize(vectors: Tensor) -> Tensor:
    """Vectors ``[n, width]`` of finite floats as records ``[n, 2 + width]`` uint8."""
    values = vectors.float()
    scales = (values.abs().amax(dim=1, keepdim=True) / _LARGEST).bfloat16()
    scales[scales < _SMALLEST_SCALE] = 0
    steps = torch.where(scales == 0, 1.0, scales.float())
    numbers = torch.where(scales == 0, 0.0, (values / steps).round().clamp(-_LARGEST, _LARGEST))
    raw = scales.flatten().view(torch.uint8).reshape(-1, SCALE_BYTES)
    return torch.cat((raw, numbers.to(torch.int8).view(torch.uint8)), dim=1)


def dequantize(records: Tensor) -> Tensor:
    """Vectors ``[n, width]`` float32 of records ``[n, 2 + width]`` uint8."""
    # A copy, since a record may begin at an odd byte.
    scales = records[:, :SCALE_BYTES].flatten().clone().view(torch.bfloat16)
    return records[:, SCALE_BYTES:].view(torch.int8).float() * scales.float()[:, None]


def as_stored(vectors: Tensor, dtype: GistDtype) -> Tensor:
    """Gists ``[n, width]`` as they will be read back: fp16, bf16, or float32 for ``int8``."""
    if dtype == "int8":
        return dequantize(quantize(vectors))
    return vectors.to(torch.float16 if dtype == "fp16" else torch.bfloat16)
