"""What all tools share, and the training of a base model, in-process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import Field

from megacontext.config import FrozenConfig
from megacontext.errors import DataError
from megacontext.runtime.base_model import BaseModel
from megacontext.training.lm_batches import END_OF_TEXT
from tools import train_base
from tools._entry import tool_main


class Settings(FrozenConfig):
    size: int = Field(default=3, ge=1)


def describe(config: Settings) -> dict[str, int]:
    print("on the way")
    return {"size": config.size}


def refuse(config: Settings) -> None:
    raise DataError(f"{config.size} is not enough; give more")


def interrupt(config: Settings) -> None:
    raise KeyboardInterrupt


def test_only_the_result_goes_to_standard_output(capsys):
    assert tool_main("test", Settings, describe, ["--set", "size=4"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "size: 4\n"
    assert captured.err == "on the way\n"


def test_the_result_as_json(tmp_path, capsys):
    assert tool_main("test", Settings, describe, ["--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == {"size": 3}
    assert tool_main("test", Settings, describe, ["--json", str(tmp_path / "result.json")]) == 0
    assert json.loads((tmp_path / "result.json").read_text()) == {"size": 3}
    assert capsys.readouterr().out == ""


def test_settings_come_from_the_file_and_then_from_the_command_line(tmp_path, capsys):
    config = tmp_path / "settings.yaml"
    config.write_text("size: 7")
    assert tool_main("test", Settings, describe, [f"--config={config}"]) == 0
    assert tool_main("test", Settings, describe, [f"--config={config}", "--set=size=8"]) == 0
    assert capsys.readouterr().out == "size: 7\nsize: 8\n"


@pytest.mark.parametrize(
    ("run", "arguments", "complaint"),
    [
        (refuse, [], "3 is not enough"),
        (describe, ["--set=size=0"], "'size' has value 0"),
        (describe, ["--set=length=1"], "unknown key 'length'"),
        (describe, ["--json=none/result.json"], "not a file in an existing folder"),
    ],
)
def test_an_error_is_one_line_and_its_exit_status(capsys, run, arguments, complaint):
    assert tool_main("test", Settings, run, arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert complaint in captured.err


def test_a_json_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    assert tool_main("test", Settings, describe, [f"--json={tmp_path}"]) == 2
    assert "on the way" not in capsys.readouterr().err


def test_an_interrupt_is_no_traceback(capsys):
    assert tool_main("test", Settings, interrupt, []) == 130
    captured = capsys.readouterr()
    assert captured.err.startswith("error: interrupted")
    assert captured.err.count("\n") == 1


def test_an_argument_that_does_not_exist_is_exit_status_2(capsys):
    with pytest.raises(SystemExit) as refused:
        tool_main("test", Settings, describe, ["--size=3"])
    assert refused.value.code == 2
    assert "--size=3" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        tool_main("test", Settings, lambda config: {"size": config.size // 0}, [])


@pytest.fixture
def training(tmp_path) -> list[str]:
    corpus = tmp_path / "corpus.txt"
    story = "The cat sat near the old mill and watched the river. " * 40
    corpus.write_text(END_OF_TEXT.join(f"Story {number}. {story}" for number in range(4)))
    values = {
        "output": tmp_path / "base",
        "corpus": f"[{corpus}]",
        "held_out_every": 2,
        "architecture": "{vocab_size: 512, hidden_size: 32, layers: 1, heads: 2, kv_heads: 1, "
        "head_dim: 16, intermediate_size: 32, max_positions: 128}",
        "phases": "[{length: 64, rows: 1, steps: 2}]",
        "tokenizer_characters": 10_000,
        "probe_rows": 1,
        "workers": 0,
        "mixed_precision": "false",
    }
    return [f"--set={key}={value}" for key, value in values.items()]


def test_train_base_prints_the_folder_of_a_model_that_loads(training, tmp_path, capsys):
    assert train_base.main([*training, "--json=-"]) == 0
    folder = json.loads(capsys.readouterr().out)["model"]
    assert folder == str(tmp_path / "base" / "model")
    base = BaseModel.from_pretrained(Path(folder))
    assert base.features(base.encode("The cat sat")).shape[1] == 32


def test_train_base_refuses_a_corpus_that_is_not_there(training, capsys):
    assert train_base.main([*training, "--set=corpus=[bundled:none]"]) == 2
    assert "no such bundled text" in capsys.readouterr().err
