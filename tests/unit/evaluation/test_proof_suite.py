"""The suite ``proof`` at the smallest scale: every kind of cell, and that a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import save_tiny_model

from megacontext.errors import ConfigError, DataError
from megacontext.evaluation.proof_asking import raw_share
from megacontext.evaluation.proof_config import ProofSuiteConfig
from megacontext.evaluation.proof_prose import positions
from megacontext.evaluation.proof_suite import run_proof_suite

STORIES = "".join(
    f"1 Mary moved to the {here}.\n2 John went to the {there}.\n3 Where is Mary? \t{here}\t1\n"
    for here, there in (("bathroom", "hallway"), ("garden", "office"), ("kitchen", "garden"))
)
ENGINE = {"budget": 384, "tail_tokens": 32, "refocus_rounds": 1}
RIVALS = ("window", "own_keys", "megacontext", "oracle", "full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random model with 512 positions, bAbI files, and a corpus of which one text is held out."""
    folder = tmp_path_factory.mktemp("proof")
    save_tiny_model(folder / "model", max_positions=512)
    (folder / "qa1_some-name_test.txt").write_text(STORIES)
    held_out = " ".join(f"The {i}th of them came home." for i in range(150))
    (folder / "corpus.txt").write_text(f"{held_out}<|endoftext|>Something else.")
    return folder


@pytest.fixture
def read(folder, tmp_path):
    """A configuration with a cell of each kind."""

    def make(**changed):
        values = {
            "model": str(folder / "model"),
            "habits": {"engine": ENGINE},
            "babi": folder,
            "corpus": [folder / "corpus.txt"],
            "held_out_every": 2,
            "rivals": RIVALS,
            "lengths": "1500",
            "far_lengths": "",
            "babilong": "qa1",
            "ruler": "niah_single",
            "recall": "planted",
            "facts": 4,
            "asked": 2,
            "wording": "plain",
            "questions": 2,
            "slow_questions": 1,
            "depths": 0.5,
            "depth_questions": 1,
            "prose": "2k",
            "prose_points": 3,
            "work": tmp_path / "work",
        }
        return ProofSuiteConfig.parse(values | changed)

    return make


def listen(config):
    said: list[str] = []
    return run_proof_suite(config, said.append), said


def test_every_kind_of_cell_is_measured_and_a_second_run_asks_nothing(read, tmp_path):
    found, said = listen(read())
    names = set(found.results)
    for rival in RIVALS[:-1]:
        suffix = "" if rival == "megacontext" else f".{rival}"
        for name in ("babilong.qa1", "ruler.niah_single", "recall.planted", "evidence_at_L0.qa1"):
            assert f"{name}.1500{suffix}" in names
            questions = 1 if rival in ("own_keys", "oracle") else 2
            assert found.results[f"{name}.1500{suffix}"].n == questions
        assert f"prose_nll.2k{suffix}" in names
    assert {"niah_depth.1500.0.5", "lead.recall.1500.window", "prose_nll_gain.2k"} <= names
    assert "full" in found.facts["refused"]
    assert found.facts["prose"]["window"]["positions"] == [32, 672, 1312]
    assert any("recall.planted.1500: question 2, megacontext" in line for line in said)
    file = tmp_path / "work" / "proof.jsonl"
    kept = file.read_bytes()
    again, silence = listen(read())
    assert silence == []
    assert file.read_bytes() == kept
    assert again == found


def test_an_interrupted_run_goes_on_where_it_ended(read, tmp_path):
    config = read(rivals="window,megacontext,full", ruler="", depth_questions=0)
    found, said = listen(config)
    file = tmp_path / "work" / "proof.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:30])
    again, rest = listen(config)
    assert 0 < len(rest) < len(said)
    assert again.facts == found.facts
    assert len(file.read_bytes().splitlines()) == len(lines)


def test_more_questions_ask_only_the_new_ones(read):
    few = {"rivals": "window", "ruler": "", "recall": "", "prose_points": 0}
    listen(read(**few))
    found, said = listen(read(**few, questions=3))
    assert found.results["babilong.qa1.1500.window"].n == 3
    assert [line for line in said if "question" in line] == [
        "2 of 3 answers; babilong.qa1.1500: question 3, window"
    ]


def test_other_habits_of_the_focus_leave_raw_rivals_alone(read):
    few = {"rivals": "window,megacontext", "ruler": "", "recall": "", "prose_points": 0}
    few |= {"depth_questions": 0, "questions": 1}
    listen(read(**few))
    _, focus = listen(read(**few, habits={"engine": ENGINE, "look_again": ""}))
    assert {line.rsplit(" ", maxsplit=1)[1] for line in focus if "question" in line} == {
        "megacontext"
    }
    _, budget = listen(read(**few, habits={"engine": ENGINE | {"budget": 352}}))
    assert {line.rsplit(" ", maxsplit=1)[1] for line in budget if "question" in line} == {
        "window",
        "megacontext",
    }


def test_the_bundled_model_finds_what_its_window_does_not_hold(folder, tmp_path):
    config = ProofSuiteConfig.parse(
        {
            "babi": folder,
            "rivals": "window,megacontext",
            "lengths": "2k",
            "far_lengths": "",
            "babilong": "qa1",
            "ruler": "niah_single",
            "recall": "key_value",
            "questions": 2,
            "depths": 0.25,
            "depth_questions": 2,
            "prose": "2k",
            "prose_points": 2,
        }
    )
    found, _ = listen(config)
    for name in ("ruler.niah_single.2k", "recall.key_value.2k", "niah_depth.2k.0.25"):
        assert found.results[name].n == 2
    assert found.results["niah_depth.2k.0.25"].value == 1.0
    assert found.results["evidence_at_L0.niah_single.2k"].value == 1.0
    assert 2 < found.results["prose_nll.2k"].value < 8
    assert found.results["peak_rss_mb"].value > 50


@pytest.mark.parametrize(
    ("changed", "error", "complaint"),
    [
        ({"prose": "2m"}, ConfigError, "prose is 2m"),
        ({"babi": Path("nowhere")}, DataError, "qa1_"),
        ({"habits": {"engine": {"budget": 4096}}}, ConfigError, "positions"),
    ],
)
def test_what_cannot_be_run_is_refused(read, changed, error, complaint):
    with pytest.raises(error, match=complaint):
        listen(read(rivals="window,megacontext", **changed))


def test_a_span_counts_as_raw_only_as_a_whole():
    raw = [(0, 10), (20, 40)]
    assert raw_share([(0, 10), (25, 30)], raw) == 1.0
    assert raw_share([(0, 11), (20, 40)], raw) == 0.5
    assert raw_share([(5, 25)], raw) == 0.0
    assert raw_share([], raw) is None


@pytest.mark.parametrize("tokens", [64, 100, 2000])
@pytest.mark.parametrize("points", [1, 3, 500])
def test_blocks_are_spread_over_the_stream(tokens, points):
    starts = positions(tokens, points, 32)
    assert len(starts) == min(points, tokens // 32 - 1)
    assert starts == sorted(set(starts))
    assert all(start % 32 == 0 and 32 <= start <= tokens - 32 for start in starts)
