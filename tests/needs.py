"""What some tests need that not every machine has."""

from __future__ import annotations

import pytest

from tools._faults import compiler

COMPILER = pytest.mark.skipif(
    compiler() is None, reason="the shim that makes calls fail needs Linux and a C compiler"
)
