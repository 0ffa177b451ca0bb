"""Digests of weights."""

from __future__ import annotations

import pytest
import torch

from megacontext.checkpoints import VERSION_DIGITS, hash_weights

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2])}


def test_the_same_weights_have_the_same_digest_in_any_order_and_layout():
    digest = hash_weights(WEIGHTS)
    assert len(digest) == VERSION_DIGITS
    assert int(digest, 16) >= 0
    assert hash_weights(dict(reversed(WEIGHTS.items()))) == digest
    strided = {**WEIGHTS, "a": WEIGHTS["a"].T.contiguous().T}
    assert not strided["a"].is_contiguous()
    assert hash_weights(strided) == digest


@pytest.mark.parametrize(
    "change",
    [
        {"c": torch.zeros(0)},
        {"a": WEIGHTS["a"].reshape(3, 2)},
        {"a": WEIGHTS["a"].double()},
        {"a": WEIGHTS["a"] + torch.eye(2, 3) * 1e-6},
        {"b": torch.tensor([2, 1])},
    ],
    ids=["name", "shape", "dtype", "value", "order"],
)
def test_any_change_tells(change):
    assert hash_weights({**WEIGHTS, **change}) != hash_weights(WEIGHTS)


def test_the_prefix_tells():
    assert hash_weights(WEIGHTS, "gistnet {}") != hash_weights(WEIGHTS)
    assert hash_weights({}, "x") != hash_weights({}, "y")
