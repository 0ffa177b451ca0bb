"""``megacontext forget``: what a source was cannot be found on the disk afterwards."""

from __future__ import annotations

import json
import random
import sqlite3
from collections import Counter
from pathlib import Path

import needs
import pytest
import torch
from tiny_models import save_tiny_model

from megacontext.memory import Memory
from megacontext.runtime.base_model import BaseModel
from tools._faults import FAULTS, answer, start

FACT = "The secret code of the rusty lantern is 48213. "
STORY = "The baker of the village went to the river every morning. "
# No two begin alike, so that each of them lies whole in the index of words.
PRIVATE = ("quagga", "zephyr", "obelisk", "xylem", "jonquil", "kumquat", "yucca", "vermouth")


def private_text() -> str:
    draw = random.Random(3)
    return ". ".join(" ".join(draw.sample(PRIVATE, 6)) for _ in range(60))


@pytest.fixture
def memory(megacontext, tmp_path) -> Path:
    """A story with a fact, private words in two files, and another story."""
    texts = {"story": STORY * 20 + FACT, "private": private_text(), "other": STORY * 30}
    for name, text in texts.items():
        (tmp_path / f"{name}.txt").write_text(text)
        done = megacontext(
            *("ingest", tmp_path / "in" / "m.mctx", tmp_path / f"{name}.txt"),
            *("--author", f"author-of-{name}", "--tag", f"tag-of-{name}"),
        )
        assert done.status == 0, done.err
    return tmp_path / "in" / "m.mctx"


def traces(folder: Path, patterns: dict[str, list[bytes]]) -> set[str]:
    """Which kinds of patterns occur in any file below a folder."""
    files = [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    assert files
    return {
        kind
        for kind, found in patterns.items()
        if any(pattern in raw for raw in files for pattern in found)
    }


def indexed_words(memory: Path) -> set[str]:
    connection = sqlite3.connect(memory / "catalog.sqlite")
    terms = {row[0] for row in connection.execute("SELECT term FROM block_terms")}
    connection.close()
    return terms


def patterns_of(memory: Path, uri: str) -> dict[str, list[bytes]]:
    """What a source has on the disk: tokens, gists, keys, words, and what is told about it."""
    with Memory.open(memory) as opened:
        (source,) = [source for source in opened.sources() if source.uri == uri]
        ids = opened.tokens(source.start, source.end)
        gists, keys = [], []
        for level in range(1, opened.n_levels):
            size = opened.identity.block_size**level
            whole = (-(-source.start // size), max(-(-source.start // size), source.end // size))
            gists += opened.gists(level, *whole).view(torch.int16)
            keys += opened.keys(level, *whole).view(torch.int16)
        names = [uri, source.sha256, source.author, *source.tags]
        return {
            "tokens": [ids[i : i + 8].numpy().tobytes() for i in range(len(ids) - 7)],
            "gists": [gist.numpy().tobytes() for gist in gists],
            "keys": [key.numpy().tobytes() for key in keys],
            "words": [word.encode() for word in PRIVATE],
            "names": [name.encode() for name in names],
        }


def test_a_source_that_is_forgotten_leaves_no_trace(megacontext, memory, tmp_path):
    uri = (tmp_path / "private.txt").as_uri()
    patterns = patterns_of(memory, uri)
    assert len(patterns["tokens"]) > 100
    assert len(patterns["gists"]) == len(patterns["keys"]) > 5
    assert traces(memory.parent, patterns) == set(patterns)
    assert "quagga" in indexed_words(memory)
    before = megacontext("inspect", memory, "--json=-").result
    done = megacontext("forget", memory, "--source", uri, "--json=-")
    assert done.status == 0, done.err
    (gone,) = [source for source in before["sources"] if source["uri"] == uri]
    n_gone = gone["end"] - gone["start"]
    assert done.result == {
        "sources": [uri],
        "forgotten": n_gone,
        "tokens": before["tokens"] - n_gone,
        "copies": [],
    }
    assert traces(memory.parent, patterns) == set()
    assert not {word[:5] for word in PRIVATE} & {word[:5] for word in indexed_words(memory)}
    assert [file.name for file in memory.parent.iterdir()] == ["m.mctx"]
    assert memory.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in memory.iterdir()} == {0o600}


def test_the_rest_answers_as_if_the_source_had_never_been_there(megacontext, memory, tmp_path):
    names = ["private.txt", "other.txt"]
    options = [word for name in names for word in ("--source", tmp_path / name)]
    assert megacontext("forget", memory, *options).status == 0
    assert megacontext("verify", memory).status == 0
    fresh = tmp_path / "fresh.mctx"
    assert megacontext("ingest", fresh, tmp_path / "story.txt").status == 0
    ask = ["What is the secret code of the rusty lantern?", "--set", "decode.max_new_tokens=8"]
    answers = {megacontext("ask", "--memory", path, *ask).out for path in (memory, fresh)}
    assert len(answers) == 1
    shown = [
        megacontext("inspect", path, "--json=-", *words).result
        for path in (memory, fresh)
        for words in ([], ["--search=lantern"])
    ]
    (kept,), (first,) = shown[0]["sources"], shown[2]["sources"]
    assert (kept["uri"], kept["start"], kept["end"]) == (first["uri"], 0, first["end"])
    assert kept["author"] == "author-of-story"
    assert shown[1]["found"] == shown[3]["found"] != []
    assert megacontext("ingest", memory, tmp_path / "other.txt").status == 0
    assert megacontext("verify", memory).status == 0


def test_an_unknown_source_is_one_line_and_changes_nothing(megacontext, memory):
    files = {file.name: file.read_bytes() for file in memory.glob("*.ctx")}
    line = megacontext("forget", memory, "--source", "nobody.txt").complaint
    assert "no source 'nobody.txt'" in line
    assert "inspect" in line
    assert {file.name: file.read_bytes() for file in memory.glob("*.ctx")} == files
    assert megacontext("forget", memory).status == 2
    assert megacontext("verify", memory).status == 0


def test_a_copy_that_a_repair_has_kept_is_named(megacontext, memory, tmp_path):
    (memory / "L1.ctx").unlink()
    option = ["--source", tmp_path / "private.txt"]
    assert "megacontext repair" in megacontext("forget", memory, *option).complaint
    assert megacontext("repair", memory).status == 0
    done = megacontext("forget", memory, *option, "--json=-")
    copy = str(memory.with_name("m.mctx.damaged"))
    assert (done.status, done.result["copies"]) == (0, [copy])
    assert copy in done.err


@needs.COMPILER
def test_a_call_that_fails_or_is_the_last_leaves_the_old_memory_or_the_new_one(tmp_path):
    """Each case: the memory is whole, a second call does the rest, and no token is left."""
    model = save_tiny_model(tmp_path / "model", max_positions=2048)
    runner = start("tests.forget_runner", [str(model)], tmp_path)
    draw, results, kinds = random.Random(5), Counter(), list(FAULTS)
    try:
        told = json.loads(answer(runner))
        assert told["sites"] > 60
        assert told["traced"] is False
        # The last sites are where the new memory takes the old one's place.
        sites = draw.sample(range(told["sites"] - 25), 6) + [told["sites"] - n for n in (4, 18, 22)]
        for number, site in enumerate(sites):
            fault = "killed before" if number % 2 else kinds[number // 2 % len(kinds)]
            print(json.dumps({"site": site, "fault": fault}), file=runner.stdin, flush=True)
            found = json.loads(answer(runner))
            assert found["wrong"] is None, (site, fault, found)
            results[found["result"]] += 1
    finally:
        runner.kill()
        runner.communicate()
    assert set(results) >= {"killed", "refused"}, results


def test_the_runner_sees_a_trace(tmp_path):
    from forget_runner import GONE, Case

    model = save_tiny_model(tmp_path / "model", max_positions=2048)
    case = Case(model, tmp_path)
    assert not case.traced()
    assert case.wrong("survived") is None
    ids = BaseModel.from_pretrained(model).encode(GONE).to(torch.int32)
    (case.path / "left.ctx").write_bytes(b"x" + ids[40:48].numpy().tobytes())
    assert case.traced()
    case.prepare()
    assert case.wrong("survived") == "forgetting is half done"
    assert case.wrong("killed") is None
