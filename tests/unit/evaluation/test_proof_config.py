from __future__ import annotations

import importlib.util

import pytest

from megacontext.config import load_config
from megacontext.errors import ConfigError
from megacontext.evaluation.proof_cells import Cell, asked_for_prose, asked_of, plan
from megacontext.evaluation.proof_config import ProofSuiteConfig, tokens_of


def read(*overrides):
    return load_config(ProofSuiteConfig, None, overrides)


@pytest.mark.parametrize(
    ("name", "tokens"), [("900", 900), ("4k", 4_000), ("1m", 1_000_000), ("10m", 10_000_000)]
)
def test_a_length_says_its_tokens(name, tokens):
    assert tokens_of(name) == tokens


def test_several_names_may_stand_in_one_text():
    text, yaml = read("lengths=4k, 16k", "ruler="), read("lengths=[4k,16k]", "ruler=[]")
    assert text.lengths == yaml.lengths == ("4k", "16k")
    assert text.ruler == yaml.ruler == ()
    assert read("lengths=2000").lengths == ("2000",)
    assert read("depths=0.5").depths == (0.5,)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("lengths=4g", "lengths"),
        ("lengths=0k", "lengths"),
        ("rivals=window,pigeon", "unknown rival 'pigeon'"),
        ("readers=pigeon", "unknown rival 'pigeon'"),
        ("readers_by_question=pigeon", "unknown rival 'pigeon'"),
        ("babilong=qa11", "babilong"),
        ("depths=1.5", "depths"),
        ("asked=21", "asked is 21"),
        ("questions=0", "questions"),
    ],
)
def test_what_cannot_be_asked_is_refused(override, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read(override)


def test_dense_retrieval_is_asked_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "dense" not in read().names
    assert read("rivals=dense").names == ("dense",)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "dense" in read().names


def test_the_published_table():
    names = [cell.name for cell in plan(read())]
    assert len(names) == len(set(names))
    assert {"babilong.qa5.1m", "babilong.qa1.10m", "recall.corrections.128k"} <= set(names)
    assert {"ruler.fwe.64k", "niah_depth.4k.0.25", "niah_depth.1m.1"} <= set(names)
    assert "babilong.qa2.10m" not in names
    lengths = [tokens_of(cell.length) for cell in plan(read())]
    assert lengths == sorted(lengths)


def test_what_is_left_out_is_not_planned():
    config = read("babilong=", "recall=", "ruler=vt", "depth_questions=0", "lengths=16k,4k,4k")
    assert [cell.name for cell in plan(config)] == ["ruler.vt.4k", "ruler.vt.16k"]


def test_a_length_may_have_fewer_questions():
    config = read("babilong=qa1", "recall=", "ruler=vt", "depth_questions=0", "lengths=4k,1m",
                  "questions=9", "questions_at={1m: 3, 10m: 2}")  # fmt: skip
    assert {cell.name: cell.questions for cell in plan(config)} == {
        "babilong.qa1.4k": 9,
        "ruler.vt.4k": 9,
        "babilong.qa1.1m": 3,
        "ruler.vt.1m": 3,
        "babilong.qa1.10m": 2,
    }
    with pytest.raises(ConfigError, match="questions_at"):
        read("questions_at={1m: 0}")


def test_far_rivals_alone_are_asked_about_far_lengths():
    config = ProofSuiteConfig.parse(
        {
            "rivals": "window,bm25,megacontext",
            "lengths": "1m",
            "far_lengths": "1m,10m",
            "far_rivals": "window,megacontext",
        }
    )
    assert set(asked_of(Cell("babilong", "qa1", "10m", 5), config)) == {"window", "megacontext"}
    assert set(asked_of(Cell("babilong", "qa1", "1m", 5), config)) == set(config.rivals)


def test_slow_rivals_are_asked_less_and_readers_up_to_a_length():
    config = read("rivals=window,megacontext,oracle,own_keys")
    window_and_ours = {"window": 100, "megacontext": 100, "oracle": 20}
    assert asked_of(Cell("ruler", "vt", "64k", 100), config) == window_and_ours | {"own_keys": 20}
    assert asked_of(Cell("ruler", "vt", "128k", 100), config) == window_and_ours
    recall = Cell("recall", "planted", "128k", 100)
    assert asked_of(recall, config) == window_and_ours | {"own_keys": 20}
    assert asked_of(Cell("niah_depth", "niah_single", "4k", 10, 0.5), config) == {"megacontext": 10}
    assert "oracle" not in asked_of(Cell("ruler", "cwe", "4k", 100), config)
    assert "own_keys" in asked_for_prose(config)
    assert "own_keys" not in asked_for_prose(read("rivals=own_keys", "prose=200k"))


def test_readers_of_single_questions_gain_nothing_where_questions_share_a_history():
    config = read("rivals=dense,kvpress.knorm", "readers_skip=16k")
    recall = {
        length: set(asked_of(Cell("recall", "planted", length, 10), config))
        for length in ("4k", "16k", "64k", "128k", "1m")
    }
    both = {"dense", "kvpress.knorm"}
    assert recall == {
        "4k": both,
        "16k": {"kvpress.knorm"},
        "64k": both,
        "128k": {"dense"},
        "1m": set(),
    }
    assert set(asked_of(Cell("babilong", "qa1", "16k", 10), config)) == both
    assert asked_for_prose(config) == ["dense"]
