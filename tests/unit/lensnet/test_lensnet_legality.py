import pytest
import torch

from megacontext.errors import InputError
from megacontext.lensnet import Legality, entry_legality, mask_scores

K = 32


def one(level, start, *, cursor, tail_start):
    legality = entry_legality(
        torch.tensor([[level]]),
        torch.tensor([[start]]),
        torch.tensor([[True]]),
        cursor=torch.tensor([cursor]),
        tail_start=torch.tensor([tail_start]),
        block_size=K,
    )
    return bool(legality.can_expand), bool(legality.can_collapse)


def test_raw_block_can_only_collapse():
    assert one(0, 0, cursor=1000, tail_start=900) == (False, True)


def test_open_block_can_do_nothing():
    assert one(0, 992, cursor=1000, tail_start=1000) == (False, False)


def test_gist_under_a_parent_can_do_both():
    assert one(1, 32, cursor=2000, tail_start=1500) == (True, True)


def test_root_cannot_collapse():
    assert one(1, 1024, cursor=2000, tail_start=1900) == (True, False)
    assert one(2, 0, cursor=K**3 - 1, tail_start=1900) == (True, False)
    assert one(2, 0, cursor=K**3, tail_start=K**3) == (True, True)


def test_tail_cannot_collapse():
    assert one(0, 64, cursor=1000, tail_start=96) == (False, True)
    assert one(0, 64, cursor=1000, tail_start=95) == (False, False)
    assert one(1, 0, cursor=2000, tail_start=1000) == (True, False)


def test_padding_can_do_nothing():
    legality = entry_legality(
        torch.tensor([[1, 10**6]]),
        torch.zeros(1, 2).long(),
        torch.tensor([[True, False]]),
        cursor=torch.tensor([5000]),
        tail_start=torch.tensor([4000]),
        block_size=K,
    )
    assert legality.can_expand.tolist() == [[True, False]]
    assert legality.can_collapse.tolist() == [[True, False]]


def test_only_the_illegal_direction_is_masked():
    scores = torch.tensor([[1.0, -1.0, 2.0, -2.0, 3.0, -3.0]], requires_grad=True)
    legality = Legality(
        torch.tensor([[True, True, False, False, False, False]]),
        torch.tensor([[False, False, True, True, False, False]]),
    )
    masked = mask_scores(scores, legality)
    assert masked.tolist() == [[1.0, 0.0, 0.0, -2.0, 0.0, 0.0]]
    masked.sum().backward()
    assert scores.grad.tolist() == [[1.0, 0.0, 0.0, 1.0, 0.0, 0.0]]


def test_highest_level_that_fits_64_bits():
    assert one(11, 0, cursor=2**62, tail_start=2**61) == (True, True)


@pytest.mark.parametrize("level", [-1, 12])
def test_levels_outside_64_bits_are_refused(level):
    with pytest.raises(InputError, match="expected 0 to 11"):
        one(level, 0, cursor=10, tail_start=0)


def test_shapes_are_checked():
    ones = torch.ones(1, 2).long()
    with pytest.raises(InputError, match="must have one shape"):
        entry_legality(
            ones,
            torch.ones(1, 3).long(),
            ones.bool(),
            cursor=torch.ones(1).long(),
            tail_start=torch.ones(1).long(),
            block_size=K,
        )
    with pytest.raises(InputError, match="must have shape"):
        entry_legality(
            ones,
            ones,
            ones.bool(),
            cursor=torch.ones(2).long(),
            tail_start=torch.ones(1).long(),
            block_size=K,
        )
