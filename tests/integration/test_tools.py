"""``python -m tools.…`` with the configurations that come with them."""

from __future__ import annotations

import json

import pytest
from command_line import ROOT, run_module

from megacontext.config import load_config
from megacontext.evaluation.poc_loop import PocLoopConfig
from tools import decode_demo, run_poc_loop

SHORT_POC = ["--set", "characters=6000", "facts=1", "--set", "max_new_tokens=4"]


def test_decode_demo_continues_a_prompt():
    done = run_module("tools.decode_demo", "--config=configs/runs/base_llm.yaml", "--json=-")
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert set(result) == {"model", "text", "tokens", "tokens_per_s", "logits", "finite"}
    assert result["finite"] is True
    assert 1 <= result["tokens"] <= 48
    assert done.err == f"Once upon a time there was a king who{result['text']}\n"


def test_decode_demo_tells_its_result_in_lines(capsys):
    assert decode_demo.main(["--set", "decode.max_new_tokens=2"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["model"] == "bundled:tiny"
    assert lines["finite"] == "True"


def test_the_poc_loop_tells_its_edits():
    config = "--config=configs/runs/poc_tiny.yaml"
    done = run_module("tools.run_poc_loop", config, *SHORT_POC, "--json=-")
    assert done.status == 0, done.err
    result = json.loads(done.out)
    assert set(result) == {"answers", "edits", "state"}
    assert [set(item) for item in result["answers"]] == [{"question", "answer", "expected"}]
    assert result["edits"] > 0
    assert result["state"]["budget"] == 512
    assert result["state"]["cost"] <= 512
    assert done.err.startswith("budget 512, policy lens\n")
    assert "expand L1" in done.err
    assert "collapse L1" in done.err
    assert "asked " in done.err


def test_the_poc_loop_is_deterministic(tmp_path):
    config = ["--config", str(ROOT / "configs/runs/poc_tiny.yaml")]
    results = [tmp_path / "first.json", tmp_path / "second.json"]
    for result in results:
        assert run_poc_loop.main([*config, *SHORT_POC, "--json", str(result)]) == 0
    assert results[0].read_bytes() == results[1].read_bytes()


def test_the_poc_loop_of_a_large_model_needs_the_model(capsys):
    path = ROOT / "configs/runs/poc_smollm3.yaml"
    assert load_config(PocLoopConfig, path).session.model == "HuggingFaceTB/SmolLM3-3B"
    assert run_poc_loop.main(["--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: HuggingFaceTB/SmolLM3-3B: no such folder, and no such model")


@pytest.mark.parametrize("tool", [decode_demo, run_poc_loop])
@pytest.mark.parametrize(
    "options", [["--set", "bogus=1"], ["--set", "bogus"], ["--config", "none"]]
)
def test_what_cannot_be_configured_is_one_line(capsys, tool, options):
    assert tool.main(options) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ")
