from __future__ import annotations

import pytest
from command_line import CommandLine


@pytest.fixture
def megacontext(capsys, monkeypatch) -> CommandLine:
    """The command in this process."""
    return CommandLine(capsys, monkeypatch)
