"""``chat`` and ``ask`` without training, on random models of every family, past their window."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from megacontext.runtime.model_loading import resolve_model

pytestmark = pytest.mark.portability

FAMILIES = ("llama", "qwen3", "smollm3", "mixtral", "gemma")
BUDGET = 192
SMALL = [
    "--set",
    f"engine.budget={BUDGET}",
    "engine.tail_tokens=32",
    "engine.query_tokens=32",
    "decode.max_new_tokens=3",
]
PROSE = "The baker of the village went to the river every morning. "
FACT = "The secret code of the rusty lantern is 48213. "
QUESTION = "What is the secret code of the rusty lantern?"


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> Path:
    """A random model of one family with the bundled tokenizer, as ``save_pretrained`` leaves it."""
    folder = tmp_path_factory.mktemp("models") / request.param
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("bundled:tiny")[0])
    config = tiny_config(request.param, max_positions=512)
    config.vocab_size = len(tokenizer)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def memory(model, megacontext, tmp_path) -> Path:
    """Ten windows of prose with one fact far from the end."""
    text, path = tmp_path / "long.txt", tmp_path / "long.mctx"
    text.write_text(PROSE * 60 + FACT + PROSE * 100)
    done = megacontext("ingest", path, text, "--set", f"model={model}", *SMALL[1:4])
    assert done.status == 0, done.err
    return path


def test_a_chat_goes_on_past_the_window(model, megacontext, tmp_path):
    memory = tmp_path / "chat.mctx"
    message = (PROSE * 8).encode() + b"\n"
    chat = ["chat", "--memory", memory, "--model", model, "--focus", "attention", "--json=-"]
    done = megacontext(*chat, *SMALL, stdin=message * 5 + b"/state\n")
    assert done.status == 0, done.err
    assert done.result["turns"] == 5
    assert done.result["history_tokens"] > 2 * BUDGET
    state = " ".join(done.err.split())
    assert "policy='attention'" in state
    assert f"budget={BUDGET}" in state
    again = megacontext(*chat, *SMALL, stdin=message)
    assert again.result["history_tokens"] > done.result["history_tokens"]


def test_lexical_focus_brings_the_evidence_into_the_window(model, memory, megacontext):
    ask = ["ask", "--memory", memory, QUESTION, "--model", model, "--focus", "lexical"]
    done = megacontext(*ask, "--explain", "--json=-", *SMALL)
    assert done.status == 0, done.err
    assert done.result["history_tokens"] > 10 * BUDGET
    assert done.result["cost"] <= BUDGET
    expanded = [line for line in done.err.splitlines() if line.startswith("expand L")]
    assert any("48213" in line or "rusty lantern" in line for line in expanded)
    recent = megacontext(*ask[:-1], "recency", "--explain", "--json=-", *SMALL)
    assert "expand L" not in recent.err


def test_attention_focus_reads_the_models_own_attention(model, memory, megacontext, tmp_path):
    events = tmp_path / "events.jsonl"
    ask = ["ask", "--memory", memory, QUESTION, "--model", model, "--focus", "attention"]
    done = megacontext(*ask, "--json=-", *SMALL, f"telemetry={events}")
    assert done.status == 0, done.err
    assert done.result["cost"] <= BUDGET
    assert done.result["edits"] > 0
    told = [json.loads(line) for line in events.read_text().splitlines()]
    assert {event["policy"] for event in told if event["kind"] == "refocus"} == {"attention"}
    again = megacontext(*ask, "--json=-", *SMALL)
    assert again.out == done.out


def test_a_focus_that_does_not_exist_is_one_line(model, memory, megacontext):
    ask = ["ask", "--memory", memory, QUESTION, "--model", model, "--focus", "bogus"]
    assert "policy" in megacontext(*ask).complaint
