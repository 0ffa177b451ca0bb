from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from megacontext.memory.number_formats import SCALE_BYTES, as_stored, dequantize, quantize

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.lists(NUMBERS, min_size=3, max_size=3), max_size=4))
def test_int8_is_near_and_what_was_read_is_stored_as_it_is(rows):
    vectors = torch.tensor(rows, dtype=torch.float32).reshape(-1, 3)
    records = quantize(vectors)
    assert records.dtype == torch.uint8
    assert records.shape == (len(rows), SCALE_BYTES + 3)
    read = dequantize(records)
    assert bool(torch.isfinite(read).all())
    largest = vectors.abs().amax(dim=1, keepdim=True)
    # Half a step, and what rounding the scale to 8 bits may add at the largest number.
    assert bool(((read - vectors).abs() <= largest * (0.5 / 127 + 2**-8) + 1e-28).all())
    assert torch.equal(quantize(read), records)
    assert torch.equal(as_stored(as_stored(vectors, "int8"), "int8"), as_stored(vectors, "int8"))


def test_zeros_and_what_is_next_to_nothing():
    vectors = torch.tensor([[0.0, 0.0], [1e-40, -1e-38], [1e-20, -2e-20]])
    read = dequantize(quantize(vectors))
    assert read[:2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert torch.allclose(read[2], vectors[2], rtol=0.01, atol=0)


def test_other_formats_are_what_torch_makes_of_them():
    vectors = torch.randn(2, 3)
    assert torch.equal(as_stored(vectors, "fp16"), vectors.half())
    assert torch.equal(as_stored(vectors, "bf16"), vectors.bfloat16())
