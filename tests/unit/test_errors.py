from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest

from megacontext import errors
from megacontext.errors import CorruptMemoryError, MegaContextError

ALL = [
    item
    for _, item in inspect.getmembers(errors, inspect.isclass)
    if issubclass(item, Exception) and item.__module__ == errors.__name__
]


def test_all_errors_form_one_tree():
    assert len(ALL) > 10
    assert all(issubclass(item, MegaContextError) for item in ALL)
    assert all(inspect.getdoc(item) for item in ALL)


def test_the_exit_code_is_that_of_a_usage_error():
    assert {item.exit_code for item in ALL} == {2}


@pytest.mark.parametrize(
    ("place", "text"),
    [
        ({"level": 1, "index": 7, "offset": 0}, "L1.ctx (level 1, index 7, byte 0): bad checksum."),
        ({"level": 0}, "L1.ctx (level 0): bad checksum."),
        ({}, "L1.ctx: bad checksum."),
    ],
)
def test_corruption_says_where_and_what_to_do(place, text):
    error = CorruptMemoryError("bad checksum", path="notes.mctx/L1.ctx", **place)
    message = str(error)
    assert message.startswith(text)
    assert "`megacontext verify notes.mctx`" in message
    assert "\n" not in message
    assert error.path == Path("notes.mctx/L1.ctx")
    for name in ("level", "index", "offset"):
        assert getattr(error, name) == place.get(name)


def test_corruption_found_in_another_process_arrives_whole():
    error = CorruptMemoryError("short file", path="m/L0.ctx", level=0, index=3, offset=76)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is CorruptMemoryError
    assert str(copy) == str(error)
    assert (copy.reason, copy.path, copy.level, copy.index, copy.offset) == (
        "short file",
        Path("m/L0.ctx"),
        0,
        3,
        76,
    )
