"""What a memory keeps to itself."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import save_tiny_model

PRIVATE = "quagga zephyr obelisk "


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), max_positions=2048)


def test_no_word_of_a_text_is_logged_or_measured(megacontext, caplog, tmp_path, model):
    """With everything logged that can be."""
    caplog.set_level(logging.DEBUG)
    (tmp_path / "t.txt").write_text(PRIVATE * 30)
    events = tmp_path / "events.jsonl"
    memory = tmp_path / "m.mctx"
    settings = ["--set", f"model={model}", f"telemetry={events}", "decode.max_new_tokens=4"]
    steps = [
        ["ingest", memory, tmp_path / "t.txt", *settings[:-1]],
        ["ask", "--memory", memory, f"Where is the {PRIVATE}?", *settings],
        ["verify", memory],
    ]
    for step in steps:
        done = megacontext("--log-level", "debug", *step)
        assert done.status == 0, done.err
        for word in PRIVATE.split():
            assert word not in done.err
            assert word not in caplog.text
    told = events.read_text()
    assert {"ingest", "refocus"} <= {json.loads(line)["kind"] for line in told.splitlines()}
    for word in PRIVATE.split():
        assert word not in told


@pytest.fixture(params=[0o022, 0o000], ids=["usual umask", "no umask"])
def umask(request) -> Iterator[int]:
    """What the user lets new files have; by itself it would let others read them."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_what_the_commands_make_is_private(megacontext, tmp_path, model):
    (tmp_path / "t.txt").write_text(PRIVATE * 30)
    option = ["--set", f"model={model}"]
    memory = tmp_path / "new" / "m.mctx"
    assert megacontext("ingest", memory, tmp_path / "t.txt", *option).status == 0
    assert megacontext("regist", memory, *option).status == 0
    (memory / "L1.g2.ctx").unlink()
    assert megacontext("repair", memory, *option).status == 0
    for folder in (memory, memory.with_name("m.mctx.damaged")):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
        assert set(modes.values()) == {0o600}, modes
