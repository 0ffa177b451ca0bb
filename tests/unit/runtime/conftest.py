"""The model that most of these tests run on."""

from __future__ import annotations

import pytest
from tiny_models import tiny_base_model


@pytest.fixture(scope="module")
def base():
    return tiny_base_model(max_positions=256)
