"""The commands on a memory, with the bundled model."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import ENVIRONMENT, run_module

from megacontext.gistnet import GistNet, GistNetConfig
from megacontext.memory import Memory

FACT = "The secret code of the rusty lantern is 48213. "
# A test run in the background of a shell ignores SIGINT, and hands that on.
INTERRUPTIBLE = (
    "import runpy, signal\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "runpy.run_module('megacontext', run_name='__main__')\n"
)
STORY = "The baker of the village went to the river every morning. "


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """A memory that tests only read: a story with one fact in its midst."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "story.txt").write_text(STORY * 20 + FACT + STORY * 20)
    done = run_module("megacontext", "ingest", "story.mctx", "story.txt", cwd=folder)
    assert done.status == 0, done.err
    return folder / "story.mctx"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "story.txt"
    path.write_text(STORY * 20)
    return path


def tokens_of(megacontext, memory: Path) -> int:
    return megacontext("stats", memory, "--json=-").result["tokens"]


def test_ingest_makes_a_memory_then_appends(megacontext, tmp_path, text):
    memory = tmp_path / "new" / "m.mctx"
    first = megacontext("ingest", memory, text, "--json", "-")
    assert first.status == 0
    assert set(first.result) == {"ingested", "skipped", "passed_over", "stats"}
    (item,) = first.result["ingested"]
    assert item == {"source": text.as_uri(), "start": 0, "tokens": first.result["stats"]["tokens"]}
    (text.parent / "more.txt").write_text(STORY * 20)
    second = megacontext("ingest", memory, text.parent / "more.txt", "--json", "-")
    assert second.result["ingested"][0]["start"] == item["tokens"]
    assert second.result["stats"]["tokens"] == 2 * item["tokens"]
    assert second.result["stats"]["sources"] == 2
    assert megacontext("verify", memory).status == 0


def test_settings_may_stand_before_what_the_command_is_about(megacontext, tmp_path, text):
    settings = ("--set", "engine.chunk_tokens=4096", "gistnet=mean")
    done = megacontext("ingest", *settings, tmp_path / "m.mctx", text)
    assert done.status == 0, done.err
    assert megacontext("stats", tmp_path / "m.mctx").status == 0


def test_ingest_takes_several_files_and_standard_input(megacontext, tmp_path, text):
    note = tmp_path / "note.md"
    note.write_text(FACT)
    memory = tmp_path / "m.mctx"
    options = ["--author", "Ada", "--tag", "a", "--tag", "b", "--json", "-"]
    done = megacontext("ingest", memory, text, note, "-", *options, stdin=FACT.encode())
    starts = [item["start"] for item in done.result["ingested"]]
    assert starts == sorted(set(starts))
    sources = megacontext("inspect", memory, "--json=-").result["sources"]
    assert [source["uri"] for source in sources] == [text.as_uri(), note.as_uri(), "stdin:"]
    assert [source["media_type"] for source in sources][:2] == ["text/plain", "text/markdown"]
    assert all(source["author"] == "Ada" for source in sources)
    assert all(source["tags"] == ["a", "b"] for source in sources)
    ends = [0, *(source["end"] for source in sources)]
    assert [source["start"] for source in sources] == ends[:-1]


@pytest.mark.parametrize(
    ("content", "offset"),
    [(b"abc\xff", 3), (b"\xfe", 0), ("ü".encode()[:1], 0), (b"x" * (1 << 20) + b"\xc3(", 1 << 20)],
)
def test_a_file_that_is_no_text_leaves_no_trace(megacontext, tmp_path, text, content, offset):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(content)
    memory = tmp_path / "m.mctx"
    line = megacontext("ingest", memory, text, bad).complaint
    assert f"bad.txt: not UTF-8 text (byte {offset})" in line
    assert not memory.exists()


def test_standard_input_that_is_no_text_is_refused(megacontext, tmp_path):
    line = megacontext("ingest", tmp_path / "m.mctx", "-", stdin=b"abc\xff").complaint
    assert "standard input: not UTF-8 text (byte 3)" in line


@pytest.mark.parametrize("name", ["none.txt", "empty", "n" * 300])
def test_a_file_that_cannot_be_read_is_refused(megacontext, tmp_path, monkeypatch, text, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    files = [name] if name == "empty" else [text, name]
    assert name in megacontext("ingest", "m.mctx", *files).complaint
    assert not (tmp_path / "m.mctx").exists()


@pytest.mark.parametrize(
    "content",
    ["a\0b\0\0c", "", "word" * 50_000, "\ufeffmark", "a\r\nb\u2028c\U0001f600", "\n" * 5000],
    ids=["nul", "empty", "huge line", "byte order mark", "odd characters", "line breaks"],
)
def test_any_text_comes_back_as_it_was(megacontext, tmp_path, content):
    file = tmp_path / "odd.txt"
    file.write_bytes(content.encode())
    memory = tmp_path / "m.mctx"
    done = megacontext("ingest", memory, file, "--json", "-")
    assert done.status == 0, done.err
    tokens = done.result["stats"]["tokens"]
    found = megacontext("inspect", memory, "--tokens", f"0:{tokens}", "--json=-")
    assert found.result["text"] == content
    assert megacontext("verify", memory).status == 0


def test_a_second_writer_is_refused_and_readers_are_not(megacontext, tmp_path, text):
    memory = tmp_path / "m.mctx"
    assert megacontext("ingest", memory, text).status == 0
    before = tokens_of(megacontext, memory)
    with Memory.open(memory, "a"):
        assert "open for writing by process" in megacontext("ingest", memory, text).complaint
        assert tokens_of(megacontext, memory) == before
    assert megacontext("ingest", memory, text).status == 0


def test_inspect_shows_sources_in_full_in_a_narrow_terminal(megacontext, stored, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    sources = megacontext("inspect", stored)
    assert sources.status == 0
    shown = "".join(line.split("│")[3].strip() for line in sources.err.splitlines() if "│" in line)
    assert shown == (stored.parent / "story.txt").as_uri()


def test_inspect_shows_text_and_what_is_found(megacontext, stored):
    found = megacontext("inspect", stored, "--search", "rusty lantern", "--json=-")
    best, second = found.result["found"][:2]
    assert {"block", "start", "score", "text"} == set(best)
    # Two neighbours share the fact.
    assert "lantern" in best["text"] + second["text"]
    assert best["score"] >= second["score"] > 0
    start = best["start"]
    shown = megacontext("inspect", stored, "--tokens", f"{start}:{start + 32}", "--json=-").result
    assert shown["text"] == best["text"]
    assert shown["identity"]["block_size"] == 32


@pytest.mark.parametrize("span", ["5", "a:b", "9:3", "0:999999", "-1:4", "²:³"])
def test_a_span_that_is_not_there_is_refused(megacontext, stored, span):
    assert f"--tokens {span}" in megacontext("inspect", stored, f"--tokens={span}").complaint


def test_stats_and_verify_as_json(megacontext, stored, tmp_path):
    stats = megacontext("stats", stored, "--json", "-")
    assert {"tokens", "levels", "sources", "bytes", "bytes_per_token"} <= set(stats.result)
    assert stats.result["levels"][1] == stats.result["tokens"] // 32
    shown = megacontext("stats", stored).err
    assert f"{stats.result['bytes']['tokens'] / stats.result['tokens']:.3f}" in shown
    file = tmp_path / "verify.json"
    done = megacontext("verify", stored, "--json", file)
    assert (done.status, done.out) == (0, "")
    report = json.loads(file.read_text())
    assert report["ok"] is True
    assert report["problems"] == []
    assert report["checked_bytes"] > stats.result["tokens"] * 4


def test_verify_names_file_and_byte_of_the_damage(megacontext, tmp_path, text):
    memory = tmp_path / "m.mctx"
    megacontext("ingest", memory, text)
    tokens = memory / "L0.ctx"
    content = bytearray(tokens.read_bytes())
    content[64 + 40] ^= 0x10
    tokens.write_bytes(content)
    done = megacontext("verify", memory, "--json=-")
    assert done.status == 2
    assert "L0.ctx" in done.err
    assert "byte " in done.err
    assert done.result["ok"] is False
    assert done.result["problems"]


def test_regist_rebuilds_the_gists_for_another_gistnet(megacontext, tmp_path, text):
    memory, folder = tmp_path / "m.mctx", tmp_path / "gistnet"
    megacontext("ingest", memory, text)
    identity = megacontext("inspect", memory, "--json=-").result["identity"]
    shape = {"n_layers": 1, "n_heads": 4, "d_ff": 64, "context_tokens": 0}
    width = identity["gist_width"]
    net = GistNet(GistNetConfig(kind="transformer", d_model=width, init_seed=1, **shape))
    net.save_pretrained(folder)
    done = megacontext("regist", memory, "--set", f"gistnet={folder}", "--json", "-")
    assert done.status == 0, done.err
    assert done.result == {"gist_version": net.version}
    assert megacontext("verify", memory).status == 0
    ask = ["ask", "--memory", memory, "What?", "--set", "decode.max_new_tokens=2"]
    assert "regist" in megacontext(*ask).complaint
    assert megacontext(*ask, f"gistnet={folder}").status == 0
    # The text needs no gists.
    assert megacontext("inspect", memory, "--tokens=0:8", "--json=-").result["text"] in STORY
    assert megacontext("regist", memory).status == 0
    assert megacontext("inspect", memory, "--json=-").result["identity"] == identity


def test_a_budget_matters_when_something_is_read(megacontext, tmp_path, text):
    memory, small = tmp_path / "m.mctx", ["engine.budget=256", "engine.tail_tokens=255"]
    assert megacontext("ingest", memory, text, "--set", *small).status == 0
    assert "budget" in megacontext("ask", "--memory", memory, "What?", "--set", *small).complaint


def test_a_configuration_file_and_what_is_set_reach_the_session(megacontext, tmp_path, text):
    config, memory = tmp_path / "session.yaml", tmp_path / "m.mctx"
    events = tmp_path / "events.jsonl"
    config.write_text(f"telemetry: {events}\nengine: {{chunk_tokens: 64}}\n")
    assert megacontext("ingest", memory, text, "--config", config).status == 0
    commits = [line for line in events.read_text().splitlines() if '"ingest"' in line]
    assert len(commits) == -(-tokens_of(megacontext, memory) // 64)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--set", "bogus=1"], "bogus"),
        (["--set", "engine.bogus=1"], "engine.bogus"),
        (["--set", "engine.budget=ten"], "engine.budget"),
        (["--set", "engine.budget=1"], "engine.budget"),
        (["--set", "engine"], "KEY=VALUE"),
        (["--set", "policy=none"], "policy"),
        (["--set", "model=bundled:none"], "bundled:none"),
        (["--set", "dtype=int8"], "dtype"),
        (["--set", "device=none"], "device"),
        (["--set", "gistnet=none"], "none"),
        (["--set", "lens=missing"], "missing"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--json", "none/result.json"], "--json none/result.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_configured_is_one_line(megacontext, tmp_path, text, options, complaint):
    memory = tmp_path / "m.mctx"
    assert complaint in megacontext("ingest", memory, text, *options).complaint
    assert not memory.exists()


@pytest.mark.parametrize(
    "command", ["inspect", "stats", "verify", "regist", "ask", "chat", "ingest"]
)
def test_a_folder_that_is_no_memory_is_refused(megacontext, tmp_path, text, command):
    other = tmp_path / "other"
    other.mkdir()
    arguments = {
        "ask": ["--memory", other, "What?"],
        "chat": ["--memory", other],
        "ingest": [other, text],
    }.get(command, [other])
    assert str(other) in megacontext(command, *arguments, stdin=b"What?\n").complaint
    assert list(other.iterdir()) == []


def test_a_memory_of_another_model_is_refused(megacontext, stored, tmp_path):
    from tiny_models import save_tiny_model

    model = save_tiny_model(tmp_path / "model")
    option = f"--set=model={model}"
    line = megacontext("inspect", stored, "--tokens=0:4", option).complaint
    assert "bundled:tiny" in line
    assert "bundled:tiny" in megacontext("ask", "--memory", stored, "What?", option).complaint


def test_an_interrupt_keeps_what_was_committed(tmp_path):
    (tmp_path / "long.txt").write_text(STORY * 60_000)
    command = [sys.executable, "-c", INTERRUPTIBLE, "ingest", "m.mctx", "long.txt"]
    process = subprocess.Popen(
        [*command, "--set", "engine.chunk_tokens=64"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
    )
    tokens = tmp_path / "m.mctx" / "L0.ctx"
    while process.poll() is None and not (tokens.exists() and tokens.stat().st_size > 4096):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, complaint = process.communicate()
    assert process.returncode == 130, complaint.decode()
    assert b"Traceback" not in complaint
    assert b"interrupted" in complaint
    with Memory.open(tmp_path / "m.mctx", "a") as memory:
        assert memory.verify().ok
        assert memory.n_tokens >= 64
        (source,) = memory.sources()
        assert (source.start, source.end) == (0, memory.n_tokens)
        assert not source.complete


def test_the_version_is_told_by_the_installed_module():
    done = run_module("megacontext", "--version")
    assert done.status == 0
    assert done.out.startswith("megacontext ")
