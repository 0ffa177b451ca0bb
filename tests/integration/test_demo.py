"""``megacontext demo``: short as a rule, in full where slow tests are asked for."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import CommandLine, run_module

from megacontext.cli import output

SHORT = ["--set", "max_characters=20000", "facts=3", "nll_points=4"]
SHORTER = ["--set", "facts=1", "nll_points=1", "frames=4", "max_new_tokens=2"]
ARMS = {"megacontext", "lexical", "window", "recency", "oracle"}


class Addresses(HTMLParser):
    """Everything on a page that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag, attrs):
        self.found += [(name, value) for name, value in attrs if name in ("src", "href", "data")]


@pytest.fixture
def book(tmp_path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("The baker went home. The river was wide. Nobody saw the fox. " * 80)
    return path


def check_page(page: str, frames: int) -> None:
    reader = Addresses()
    reader.feed(page)
    assert reader.found == []
    assert not re.search(r"https?://|\bsrc=|@import|url\(", page)
    data = json.loads(re.search(r"const data = (.*);\n", page)[1])
    assert len(data["frames"]) == frames
    assert all(frame["cost"] <= data["budget"] for frame in data["frames"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The short demo as a user runs it, and the folder that it ran in."""
    folder = tmp_path_factory.mktemp("demo")
    return run_module("megacontext", "demo", *SHORT, "--json", "-", cwd=folder), folder


def test_the_demo_ends_with_the_documented_json(demo):
    done, _ = demo
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert set(result) == {"history_tokens", "budget", "nll", "answers", "focus"}
    assert result["budget"] == 1024
    assert result["history_tokens"] > 4 * result["budget"]
    assert set(result["nll"]) == {"megacontext", "window", "full"}
    assert result["nll"]["full"] is None
    for arm in ("megacontext", "window"):
        estimate = result["nll"][arm]
        assert set(estimate) == {"value", "n", "ci95"}
        assert estimate["n"] == 4
        assert estimate["ci95"][0] <= estimate["value"] <= estimate["ci95"][1]
    assert set(result["answers"]) == ARMS
    for score in result["answers"].values():
        assert set(score) == {"correct", "asked"}
        assert 0 <= score["correct"] <= score["asked"] == 3
    assert set(result["focus"]) == {"edits", "swap_rate", "residency", "utilization"}
    assert result["focus"]["edits"] > 0
    assert 0 < result["focus"]["utilization"] <= 1


def test_the_demo_shows_what_it_found_and_leaves_no_memory(demo):
    done, folder = demo
    assert "Traceback" not in done.err
    assert "Planted facts" in done.err
    assert done.err.count("sliding window") >= 1
    assert [path.name for path in folder.iterdir()] == ["demo_focus.html"]


def test_the_playback_needs_nothing_but_itself(demo):
    _, folder = demo
    check_page((folder / "demo_focus.html").read_text(encoding="utf-8"), frames=120 + 3)


def test_the_same_demo_has_the_same_result(demo, tmp_path, megacontext):
    done, folder = demo
    page, memory = tmp_path / "again.html", tmp_path / "demo.mctx"
    again = megacontext("demo", *SHORT, "--json=-", "--html", page, "--memory", memory)
    assert again.out == done.out
    assert page.read_bytes() == (folder / "demo_focus.html").read_bytes()
    stats = megacontext("stats", memory, "--json=-").result
    assert stats["tokens"] == again.result["history_tokens"]
    refused = megacontext("demo", *SHORT, "--html", page, "--memory", memory)
    assert str(memory) in refused.err
    assert refused.status == 2


def test_a_book_of_ones_own_on_a_terminal(megacontext, tmp_path, book, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(output.console, "is_interactive", True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(output.console, "is_interactive", True)
    file, page = tmp_path / "result.json", tmp_path / "own.html"
    own = ["--set", f"book={book}", *SHORTER[1:]]
    small = ["engine.budget=256", "engine.tail_tokens=64"]
    done = megacontext("demo", *own, *small, "--html", page, "--json", file)
    assert done.status == 0, done.err
    assert done.out == ""
    result = json.loads(file.read_text())
    assert result["budget"] == 256
    assert result["answers"]["megacontext"]["asked"] == 1
    assert "raw tokens" in done.err
    check_page(page.read_text(encoding="utf-8"), frames=4 + 1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "book.txt: cannot be read"),
        (b"\xff\xfe", "book.txt: not UTF-8 text (byte 0)"),
        (b"", "room for 0 facts"),
        (b"no sentence", "room for 0 facts"),
    ],
    ids=["missing", "no text", "empty", "no sentence"],
)
def test_a_book_that_cannot_be_used_is_one_line(megacontext, tmp_path, book, content, complaint):
    if content is None:
        book.unlink()
    else:
        book.write_bytes(content)
    page = tmp_path / "page.html"
    assert complaint in megacontext("demo", "--html", page, "--set", f"book={book}").complaint
    assert not page.exists()


def test_a_page_that_could_not_be_written_is_refused_first(megacontext, tmp_path, book):
    page = tmp_path / "none" / "page.html"
    done = megacontext("demo", "--html", page, "--set", f"book={book}", *SHORTER[1:])
    assert f"--html {page}" in done.complaint


def test_a_budget_below_the_coarsest_context_is_one_line(megacontext, tmp_path, book):
    page, budget = tmp_path / "page.html", ["engine.budget=64", "engine.tail_tokens=0"]
    done = megacontext("demo", "--html", page, "--set", f"book={book}", *SHORTER[1:], *budget)
    assert "budget" in done.err.splitlines()[-1]
    assert done.status == 2
    assert "Traceback" not in done.err


@pytest.mark.slow
def test_the_full_demo(megacontext: CommandLine, tmp_path):
    done = megacontext("demo", "--json=-", "--html", tmp_path / "demo.html")
    assert done.status == 0, done.err
    result = done.result
    right = {arm: score["correct"] for arm, score in result["answers"].items()}
    assert result["history_tokens"] >= 100_000
    assert all(score["asked"] == 20 for score in result["answers"].values())
    assert right["megacontext"] >= 16, right
    assert right["window"] <= 2, right
    assert right["oracle"] >= right["megacontext"] >= right["recency"], right
