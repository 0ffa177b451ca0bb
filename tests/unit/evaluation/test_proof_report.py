from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from megacontext.errors import DataError
from megacontext.evaluation.metrics import Estimate, proportion
from megacontext.evaluation.proof_line import ProofLine
from megacontext.evaluation.proof_report import write_report
from megacontext.evaluation.report import suite_line

RIVALS = ["window", "kvpress.knorm", "megacontext", "own_keys", "oracle", "full"]
SETUP = {
    "base_digest": "0123456789abcdef",
    "device": "cpu",
    "dtype": "float32",
    "budget": 1024,
    "tail_tokens": 256,
    "asked_tail_tokens": 64,
    "positions": "gists_first",
    "policy": "lexical",
    "gistnet": "aaaa",
    "lens": "none",
    "noise": ["classics.txt.zst"],
    "questions": 8,
    "questions_at": {"1m": 4},
    "facts": 20,
    "asked": 2,
    "wording": "ruler",
    "depth_questions": 2,
    "slow_rivals": ["own_keys", "oracle"],
    "slow_questions": 4,
    "readers": ["own_keys", "kvpress.knorm"],
    "readers_up_to": "4k",
    "readers_recall_up_to": "128k",
    "readers_by_question": ["kvpress.knorm"],
    "readers_skip": ["16k", "64k"],
    "python": "3.12.1",
    "torch": "2.13.0",
    "transformers": "5.0.0",
    "threads": 1,
    "cores": 2,
    "machine": "Linux x86_64",
}


def results() -> dict[str, Estimate]:
    found = {}
    hits = {"": 3, ".window": 8, ".kvpress.knorm": 2, ".oracle": 8}
    for length in ("4k", "128k"):
        for task in ("babilong.qa1", "babilong.qa1-5", "ruler.niah_single", "ruler.vt"):
            for rival, right in hits.items():
                found[f"{task}.{length}{rival}"] = proportion(right, 8)
        for depth in ("0", "0.5", "1"):
            found[f"niah_depth.{length}.{depth}"] = proportion(2, 2)
        for rival in hits:
            found[f"seconds_per_answer.{length}{rival}"] = Estimate(0.5, 0.4, 0.6, 16)
            found[f"evidence_at_L0.vt.{length}{rival}"] = Estimate(0.25, 0.1, 0.4, 8)
    found["ruler.vt.4k.own_keys"] = proportion(1, 4)
    found["recall.planted.128k"] = proportion(1, 8)
    found["recall.planted.128k.window"] = proportion(8, 8)
    found["lead.recall.128k"] = found["lead.recall.128k.window"] = Estimate(-87.5, -100, -62.5, 8)
    found["prose_nll.100k"] = Estimate(3.5, 3.4, 3.6, 3)
    found["prose_nll.100k.window"] = Estimate(3.4, 3.3, 3.5, 3)
    found["prose_nll_gain.100k"] = Estimate(-0.1, -0.12, -0.08, 3)
    found["seconds_to_index.4k.own_keys"] = Estimate(7, 6, 8, 4)
    found["swap_rate.4k"] = Estimate(0.05, 0.04, 0.06, 16)
    found["ingest_tokens_per_s"] = Estimate(123456, 120000, 130000, 16)
    found["peak_rss_mb"] = Estimate(700, 700, 700, 1)
    return found


def line():
    facts = {
        "setup": SETUP,
        "rivals": RIVALS,
        "tasks": {"babilong": ["qa1"], "ruler": ["niah_single", "vt"], "recall": ["planted"]},
        "lengths": ["4k", "128k"],
        "prose_length": "100k",
        "commits": ["abc", "def"],
        "scores": {},
        "prose": {
            rival: {"positions": [32, 64, 96], "nll": [3.0, 3.5, 4.0]}
            for rival in ("window", "megacontext")
        },
        "refused": {"full": {"ruler.vt.4k": "too long", "ruler.vt.128k": "far too long"}},
    }
    command = "megacontext bench proof --json runs/proof.json"
    return suite_line("proof", results(), model="m", seed=3, command=command, **facts)


def write(folder):
    read = ProofLine.of(json.loads(json.dumps(line())))
    page, *pictures = write_report(read, folder / "docs" / "page.md", folder / "docs" / "page")
    return page.read_text(), {path.stem: path.read_text() for path in pictures}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page's text, and the pictures' by name."""
    return write(tmp_path_factory.mktemp("report"))


def test_losing_rows_are_printed_like_winning_ones(written):
    text, _ = written
    won = "1.00 (0.68 to 1.00)"
    lost = "0.38 (0.14 to 0.69)"
    assert f"| qa1 | 4k | 8 | {won} | 0.25 (0.07 to 0.59) | {lost} | {won} |" in text
    assert f"| qa1-5 | 128k | 8 | {won} |" in text
    assert f"| planted | 128k | 8 | {won} | 0.12 (0.02 to 0.47) |" in text
    assert "| `lead.recall.128k` | 8 | -87.50 (-100.00 to -62.50) |" in text
    assert "| megacontext | 3 | 3.50 (3.40 to 3.60) | -0.1000 (-0.1200 to -0.0800) |" in text


def test_what_was_to_be_shown_is_told_reached_or_not(written):
    rows = [row for row in written[0].splitlines() if row.startswith("| `")]
    told = {row.split("`")[1]: row.rsplit("|", maxsplit=2)[1].strip() for row in rows}
    assert told["babilong.qa1-5.128k"] == "**no**"
    assert told["babilong.qa1-5.1m"] == "not measured"
    assert told["prose_nll_gain.100k"] == "**no**"


def test_who_was_asked_less_or_not_is_told(written):
    text, _ = written
    assert "| vt | 4k | 8 (4) |" in text
    assert (
        "| own_keys | not asked beyond 4k (128k for planted facts and prose, not at 16k, 64k): it "
        "reads all of a history with a model first |\n"
        "| kvpress.knorm | not asked beyond 4k: it reads all of a history with a model, anew for "
    ) in text
    assert "| full | refused in 2 cells, the first `ruler.vt.4k`: too long |" in text
    assert "8; 4 at 1m; 4 for own_keys, oracle" in text


def test_set_up_seed_command_and_commits_are_told(written):
    text, _ = written
    for part in ("megacontext bench proof --json", "seed 3", "`abc`, `def`", "torch 2.13.0"):
        assert part in text
    assert "| `ingest_tokens_per_s` | 16 | 123,456 (120,000 to 130,000) |" in text


def test_pictures_name_rivals_and_lengths_and_are_the_same_on_every_run(written, tmp_path):
    text, pictures = written
    assert write(tmp_path) == written
    assert set(pictures) == {"accuracy", "nll", "time", "depth"}
    for name, drawn in pictures.items():
        assert ElementTree.fromstring(drawn).tag.endswith("svg")
        assert f"](page/{name}.svg)" in text
    for word in ("megacontext", "kvpress.knorm", "128k", "recall, mean of 1 tasks"):
        assert word in pictures["accuracy"]
    assert "50 %" in pictures["depth"]
    assert "own_keys" not in pictures["nll"]


def test_without_results_there_is_a_page_without_pictures(tmp_path):
    empty = line() | {"results": [], "prose": {}, "refused": {}}
    page, *pictures = write_report(ProofLine.of(empty), tmp_path / "page.md", tmp_path)
    assert pictures == []
    assert "What was to be shown" not in page.read_text()


def test_a_line_is_read_from_its_file(tmp_path):
    file = tmp_path / "proof.json"
    file.write_text(json.dumps(line()) + "\n")
    read = ProofLine.read(file)
    assert read.family_means("ruler", "kvpress.knorm") == {"4k": 0.25, "128k": 0.25}
    assert read.family_means("recall", "megacontext") == {"128k": 0.125}
    assert read.depths()["128k", 0.5] == 1.0
    assert len(read.depths()) == 6


@pytest.mark.parametrize("content", ["", "{", "[]", '{"suite": "base", "results": []}'])
def test_a_file_of_something_else_is_refused(tmp_path, content):
    file = tmp_path / "proof.json"
    file.write_text(content)
    with pytest.raises(DataError, match="no results of the suite proof"):
        ProofLine.read(file)
    with pytest.raises(DataError, match="cannot be read"):
        ProofLine.read(tmp_path / "none.json")
