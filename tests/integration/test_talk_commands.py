"""``ask`` and ``chat``, with the bundled model and with random models of other architectures."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import run_module
from tiny_models import save_tiny_model, tiny_model, tiny_tokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FACT = "The secret code of the rusty lantern is 48213. "
SHORT = ["--set", "decode.max_new_tokens=6"]


@pytest.fixture
def memory(tmp_path, megacontext) -> Path:
    text = tmp_path / "facts.txt"
    text.write_text(FACT * 20)
    path = tmp_path / "facts.mctx"
    assert megacontext("ingest", path, text).status == 0
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """A folder for each architecture; ``chat`` has a chat template."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: save_tiny_model(root / name, name) for name in ("llama", "gpt-neox", "gpt2")}
    folders["chat"] = root / "chat"
    tiny_model("qwen3").save_pretrained(folders["chat"])
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folders["chat"])
    return folders


def remembered(megacontext, memory: Path, *options: object) -> str:
    tokens = megacontext("stats", memory, "--json=-").result["tokens"]
    shown = megacontext("inspect", memory, f"--tokens=0:{tokens}", "--json=-", *options)
    return shown.result["text"]


def test_ask_answers_and_leaves_the_memory_as_it_was(megacontext, memory):
    before = megacontext("stats", memory, "--json=-").result
    question = "What is the secret code of the rusty lantern?"
    done = megacontext("ask", "--memory", memory, question, "--json", "-")
    assert done.status == 0, done.err
    assert set(done.result) == {"answer", "written", "edits", "cost", "history_tokens"}
    assert done.result["history_tokens"] == before["tokens"]
    assert done.out.splitlines()[0].strip() == done.result["written"]
    assert megacontext("stats", memory, "--json=-").result == before
    assert megacontext("ask", "--memory", memory, question, "--json", "-").out == done.out


def test_ask_explains_what_was_in_focus(megacontext, tmp_path):
    text, memory = tmp_path / "long.txt", tmp_path / "long.mctx"
    prose = "The baker of the village went to the river every morning. "
    text.write_text(prose * 60 + FACT + prose * 60)
    small = ["--set", "engine.budget=256", "engine.tail_tokens=64", "decode.max_new_tokens=4"]
    assert megacontext("ingest", memory, text, *small[:3]).status == 0
    question = "What is the secret code of the rusty lantern?"
    done = megacontext("ask", "--memory", memory, question, "--explain", *small)
    assert done.status == 0, done.err
    assert "raw tokens" in done.err
    (expansion,) = [line for line in done.err.splitlines() if "48213" in line or "lantern" in line][
        :1
    ]
    assert expansion.startswith("expand L")
    assert "nats" in expansion


def test_ask_of_an_empty_memory_without_a_prompt_is_refused(megacontext, tmp_path):
    empty, memory = tmp_path / "empty.txt", tmp_path / "m.mctx"
    empty.write_text("")
    megacontext("ingest", memory, empty)
    ask = ["ask", "--memory", memory, "", "--set", "template=none"]
    assert "nothing to continue" in megacontext(*ask).complaint


def test_a_chat_remembers_both_sides(megacontext, tmp_path):
    memory = tmp_path / "chat.mctx"
    first, second = b"My name is Ada.\n", b"What is my name?\n"
    done = megacontext(
        "chat", "--memory", memory, "--json=-", *SHORT, stdin=first + b"/state\n" + second
    )
    assert done.status == 0, done.err
    assert done.result["turns"] == 2
    assert "cursor=" in done.err
    text = remembered(megacontext, memory)
    assert text.index("My name is Ada.") < text.index("What is my name?")
    assert text.count("\nAnswer:") == 2
    again = megacontext("chat", "--memory", memory, "--json=-", *SHORT, stdin=second)
    assert again.result["history_tokens"] > done.result["history_tokens"]
    longer = remembered(megacontext, memory)
    assert longer.startswith(text)
    answer = again.out.splitlines()[0].strip()
    assert longer.endswith(answer) or answer in longer[len(text) :]


def test_a_chat_through_a_pipe(tmp_path):
    done = run_module(
        "megacontext", "chat", "--memory", "m.mctx", *SHORT, cwd=tmp_path, stdin=b"Hello\n"
    )
    assert done.status == 0, done.err
    assert len(done.out.splitlines()) == 1
    assert done.err == ""


def test_a_chat_message_that_is_no_text_ends_it(megacontext, tmp_path):
    memory = tmp_path / "m.mctx"
    line = megacontext("chat", "--memory", memory, stdin=b"\xff\n").complaint
    assert "standard input: not UTF-8 text" in line


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gpt2"])
def test_any_model_folder_talks_without_training(megacontext, tmp_path, models, name):
    memory = tmp_path / "m.mctx"
    limits = ["engine.budget=128", "engine.tail_tokens=32", "decode.max_new_tokens=4"]
    options = ["--model", models[name], "--json=-", "--set", *limits]
    message = b"The river is wide. " * 20 + b"\n"
    done = megacontext("chat", "--memory", memory, *options, stdin=message * 2)
    assert done.status == 0, done.err
    assert done.result["turns"] == 2
    assert done.result["history_tokens"] >= 2 * len(message)
    asked = megacontext("ask", "--memory", memory, "What is wide?", *options)
    assert asked.status == 0, asked.err
    assert asked.result["history_tokens"] == done.result["history_tokens"]
    assert asked.result["cost"] <= 128


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("none", "Hello"),
        ("question", "\nQuestion: Hello\nAnswer:"),
        ("chat", "<user>Hello\n<assistant>"),
        ("auto", "<user>Hello\n<assistant>"),
    ],
)
def test_a_message_becomes_a_prompt_as_configured(
    megacontext, tmp_path, models, template, expected
):
    memory, model = tmp_path / "m.mctx", f"--set=model={models['chat']}"
    options = [model, f"--set=template={template}", "--set=decode.max_new_tokens=1"]
    small = ["--set=engine.budget=128", "--set=engine.tail_tokens=32"]
    done = megacontext("chat", "--memory", memory, *options, *small, stdin=b"Hello\n")
    assert done.status == 0, done.err
    text = remembered(megacontext, memory, model)
    assert text.startswith(expected)
    assert len(text) <= len(expected) + 1


def test_a_chat_template_that_is_not_there_is_refused(megacontext, memory):
    ask = ["ask", "--memory", memory, "Hello", "--set", "template=chat"]
    assert "no chat template" in megacontext(*ask).complaint


def test_a_model_that_is_not_in_the_cache_is_one_line(tmp_path):
    done = run_module(
        "megacontext", "chat", "--memory", "m.mctx", "--model", "nobody/nothing", cwd=tmp_path
    )
    assert "nobody/nothing: no such folder, and no such model" in done.complaint
    assert not (tmp_path / "m.mctx").exists()


def test_a_folder_without_a_model_is_one_line(megacontext, memory, tmp_path):
    ask = ["ask", "--memory", memory, "Hello", "--model", tmp_path]
    assert "config.json" in megacontext(*ask).complaint


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("decode.max_new_tokens=0", "decode.max_new_tokens"),
        ("decode.temperature=0.5", "do_sample"),
        ("decode.bogus=1", "decode.bogus"),
        ("template=bogus", "template"),
    ],
)
def test_what_cannot_be_decoded_is_one_line(megacontext, memory, setting, complaint):
    assert complaint in megacontext("ask", "--memory", memory, "Hello", "--set", setting).complaint


def test_a_seed_decides_what_is_sampled(megacontext, memory):
    ask = ["ask", "--memory", memory, "Tell", "--set", "decode.do_sample=true", *SHORT]
    hot = [*ask, "--set", "decode.temperature=3.0"]
    answers = {megacontext(*hot, f"--set=decode.seed={seed}").out for seed in (1, 1, 2, 3)}
    assert 2 <= len(answers) <= 3
