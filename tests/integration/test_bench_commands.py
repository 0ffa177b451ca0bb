"""``megacontext bench``: whatever a suite measures ends as one JSON line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from command_line import run_module
from tiny_models import save_tiny_model

TASKS = [f"qa{number}" for number in range(1, 11)]
STORY = """\
1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Where is Daniel? \thallway\t4
1 Sandra took the milk there.
2 What is Sandra carrying? \tmilk\t1
"""
INGEST_NAMES = [
    "ingest.tokens_per_s",
    "ingest.rss_growth_mb",
    "ingest.reopen_ms",
    "ingest.bytes_per_token",
    "ingest.tokens",
]
BASE_NAMES = [
    *(f"babi.in_window.{task}" for task in TASKS),
    "babi.in_window.qa1-5",
    "key_recall.16x6",
    "prose.bits_per_byte",
]


@pytest.fixture
def babi(tmp_path) -> Path:
    folder = tmp_path / "babi"
    folder.mkdir()
    for task in TASKS:
        (folder / f"{task}_some-name_test.txt").write_text(STORY)
    return folder


def check_line(line, suite: str, names: list[str]) -> dict[str, dict]:
    assert {"suite", "commit", "results", "model", "seed", "command"} == set(line)
    assert line["suite"] == suite
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", line["commit"])
    assert [result["name"] for result in line["results"]] == names
    for result in line["results"]:
        assert set(result) == {"name", "value", "n", "ci95"}
        assert result["n"] >= 1
        assert result["ci95"][0] <= result["value"] <= result["ci95"][1]
    return {result["name"]: result for result in line["results"]}


def test_bench_ingest(tmp_path):
    done = run_module(
        "megacontext", "bench", "ingest", "--quick", "--set", "tokens=20000", "warm_tokens=5000",
        "--set", "engine.chunk_tokens=4096", cwd=tmp_path,
    )  # fmt: skip
    assert done.status == 0, done.err
    results = check_line(done.result, "ingest", INGEST_NAMES)
    assert results["ingest.tokens"]["value"] >= 20_000
    assert results["ingest.tokens_per_s"]["value"] > 100
    assert done.result["command"].startswith("megacontext bench ingest --quick")
    assert list(tmp_path.iterdir()) == []


def test_bench_ingest_refuses_to_warm_up_for_ever(megacontext):
    done = megacontext("bench", "ingest", "--set", "tokens=2000", "warm_tokens=3000")
    assert "warm_tokens is 3000" in done.complaint


def test_bench_base(megacontext, babi, tmp_path):
    file = tmp_path / "base.json"
    settings = [f"babi={babi}", "samples=4", "prose_windows=2", "window=256"]
    done = megacontext("bench", "base", "--quick", "--set", *settings, "--json", file)
    assert done.status == 0, done.err
    results = check_line(done.result, "base", BASE_NAMES)
    assert file.read_text() == done.out.splitlines()[-1] + "\n"
    assert [results[f"babi.in_window.{task}"]["n"] for task in TASKS] == [3] * 10
    assert results["babi.in_window.qa1-5"]["n"] == 15
    assert results["key_recall.16x6"]["n"] == 4
    assert 0 < results["prose.bits_per_byte"]["value"] < 8
    again = megacontext("bench", "base", "--quick", "--set", *settings)
    assert again.result["results"] == done.result["results"]


def test_bench_base_leaves_out_stories_that_do_not_fit(megacontext, babi):
    long = "".join(f"{number} Mary moved to the bathroom.\n" for number in range(1, 80))
    (babi / "qa2_some-name_test.txt").write_text(f"{STORY}{long}80 Where is Mary? \tbathroom\t79\n")
    settings = [f"babi={babi}", "samples=9", "prose_windows=1", "window=128"]
    done = megacontext("bench", "base", "--set", *settings)
    assert check_line(done.result, "base", BASE_NAMES)["babi.in_window.qa2"]["n"] == 3


@pytest.mark.parametrize(
    "content", [None, "", "no number\n", f"1 {'word ' * 400}\n2 Who? \tI\t1\n"]
)
def test_bench_base_without_usable_babi_files_is_one_line(megacontext, babi, content):
    if content is None:
        (babi / "qa1_some-name_test.txt").unlink()
    else:
        (babi / "qa1_some-name_test.txt").write_text(content)
    settings = [f"babi={babi}", "window=128", "prose_windows=1", "samples=2"]
    assert "qa1_" in megacontext("bench", "base", "--set", *settings).complaint


def test_bench_base_of_a_window_beyond_the_model_is_one_line(megacontext, babi, tmp_path):
    model = save_tiny_model(tmp_path / "model")
    settings = [f"babi={babi}", f"model={model}", "window=4096", "samples=1", "prose_windows=1"]
    assert "window" in megacontext("bench", "base", "--set", *settings).complaint


@pytest.mark.slow
def test_a_million_tokens_are_taken_in_in_constant_memory(tmp_path):
    done = run_module("megacontext", "bench", "ingest", cwd=tmp_path)
    assert done.status == 0, done.err
    results = check_line(done.result, "ingest", INGEST_NAMES)
    assert results["ingest.tokens"]["value"] >= 1_000_000
    assert results["ingest.rss_growth_mb"]["value"] < 50
