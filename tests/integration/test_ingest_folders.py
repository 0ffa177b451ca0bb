"""Folders, repeated and interrupted ingests, as typed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ENVIRONMENT

from megacontext.memory import Memory

STORY = "The baker of the village went to the river every morning. "
SMALL = ["--set", "engine.chunk_tokens=64", "ingest.readers=3", "--json=-"]


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "notes"
    for number, name in enumerate(("b.md", "a.txt", "deep/z.md", "deep/x.py")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"Note {number}. " + STORY * number)
    (root / ".secret").write_text("hidden")
    (root / "picture.png").write_bytes(b"\x89PNG\0")
    return root


def uris(root: Path, *names: str) -> list[str]:
    return [(root / name).as_uri() for name in names]


def test_a_folder_is_taken_in_and_what_is_passed_over_is_told(megacontext, tmp_path, folder):
    memory = tmp_path / "m.mctx"
    done = megacontext("ingest", memory, folder, "--json=-")
    assert done.status == 0, done.err
    order = uris(folder, "a.txt", "b.md", "deep/x.py", "deep/z.md")
    assert [item["source"] for item in done.result["ingested"]] == order
    assert done.result["skipped"] == []
    assert done.result["passed_over"] == [
        {"path": str(folder / ".secret"), "reason": "hidden"},
        {"path": str(folder / "picture.png"), "reason": "binary"},
    ]
    assert "2 passed over: 1 binary, 1 hidden" in done.err
    sources = megacontext("inspect", memory, "--json=-").result["sources"]
    assert [source["uri"] for source in sources] == order
    assert all(source["complete"] for source in sources)
    assert megacontext("verify", memory).status == 0


def test_patterns_and_a_memory_within_the_folder(megacontext, folder):
    memory = folder / "m.mctx"
    patterns = ["--pattern", "*.md", "--pattern=*.py"]
    done = megacontext("ingest", memory, folder, *patterns, "--json=-")
    assert [item["source"] for item in done.result["ingested"]] == uris(
        folder, "b.md", "deep/x.py", "deep/z.md"
    )
    again = megacontext("ingest", memory, folder, *patterns, "--json=-")
    assert again.result["ingested"] == []
    assert {"path": str(memory), "reason": "a memory"} in again.result["passed_over"]
    none = megacontext("ingest", folder.parent / "n.mctx", folder, "--pattern", "*.doc")
    assert "no file of *.doc" in none.complaint
    assert not (folder.parent / "n.mctx").exists()


def test_the_same_command_takes_in_only_what_is_new(megacontext, tmp_path, folder):
    memory = tmp_path / "m.mctx"
    first = megacontext("ingest", memory, folder, "--json=-").result
    (folder / "b.md").write_text("Another note.")
    (folder / "c.md").write_text("A new note.")
    second = megacontext("ingest", memory, folder, "--json=-")
    assert [item["source"] for item in second.result["ingested"]] == uris(folder, "b.md", "c.md")
    assert second.result["skipped"] == uris(folder, "a.txt", "deep/x.py", "deep/z.md")
    assert "3 unchanged and complete, skipped" in second.err
    third = megacontext("ingest", memory, folder / "a.txt", "--again", "--json=-").result
    (item,) = third["ingested"]
    assert item["tokens"] == first["ingested"][0]["tokens"]
    assert item["start"] == second.result["stats"]["tokens"]
    uri = (folder / "a.txt").as_uri()
    sources = megacontext("inspect", memory, "--json=-").result["sources"]
    assert [source["uri"] for source in sources].count(uri) == 2


def test_a_killed_command_is_finished_by_the_same_command(megacontext, tmp_path, folder):
    (folder / "long.txt").write_text(STORY * 3_000)
    memory = tmp_path / "m.mctx"
    command = ["ingest", memory, folder, *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "megacontext", *map(str, command)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    tokens = memory / "L0.ctx"
    while process.poll() is None and not (tokens.exists() and tokens.stat().st_size > 8192):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with Memory.open(memory) as cut:
        assert cut.verify().ok
        there = cut.n_tokens
        assert not cut.sources()[-1].complete
    done = megacontext("ingest", memory, folder, "--json=-")
    assert done.status == 0, done.err
    whole = tmp_path / "whole.mctx"
    assert megacontext("ingest", whole, folder).status == 0
    with Memory.open(memory) as resumed, Memory.open(whole) as expected:
        assert resumed.tokens().tolist() == expected.tokens().tolist()
        assert [(s.uri, s.sha256, s.start, s.end, s.complete) for s in resumed.sources()] == [
            (s.uri, s.sha256, s.start, s.end, s.complete) for s in expected.sources()
        ]
        assert sum(item["tokens"] for item in done.result["ingested"]) == (
            expected.n_tokens - there
        )
    assert "goes on behind" in done.err
