"""What must be closed is closed once a ``with`` statement over it ends, however it ends."""

from __future__ import annotations

import pytest

from megacontext.closing import Closing


class Door(Closing):
    def __init__(self) -> None:
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


def test_it_is_closed_at_the_end():
    with Door() as door:
        assert door.closed == 0
    assert door.closed == 1


def test_it_is_closed_after_an_error_which_goes_on():
    door = Door()
    with pytest.raises(ValueError, match="draught"), door:
        raise ValueError("draught")
    assert door.closed == 1


def test_something_that_cannot_be_closed_cannot_be_made():
    class Wall(Closing):
        pass

    with pytest.raises(TypeError, match="close"):
        Wall()
