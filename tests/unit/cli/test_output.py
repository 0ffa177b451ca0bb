from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest

from megacontext.cli.output import (
    add_config_options,
    check_writable,
    end_settings,
    read_config,
    run_command,
    write_json,
)
from megacontext.config import FrozenConfig
from megacontext.errors import ConfigError, InputError


class Sizes(FrozenConfig):
    a: int = 0
    b: int = 0


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    "arguments",
    [["--set", "a=1", "b=2"], ["--set", "a=1", "--set", "b=2"], ["--set=a=1", "--set=b=2"]],
)
def test_several_keys_can_be_set_in_either_way(arguments):
    assert read_config(Sizes, parsed(*arguments)) == Sizes(a=1, b=2)


@pytest.mark.parametrize(
    ("words", "ended"),
    [
        ("--set a=1 b.c=2 m.mctx f.txt", "--set=a=1 --set=b.c=2 m.mctx f.txt"),
        ("m.mctx --set a=1 --json - f.txt", "m.mctx --set=a=1 --json - f.txt"),
        ("--set a=1 f.txt b=2.txt", "--set=a=1 f.txt b=2.txt"),
        ("--set a=1 --set b=2 f.txt", "--set=a=1 --set=b=2 f.txt"),
        ("--set=a=1 f.txt", "--set=a=1 f.txt"),
        ("--set f.txt a=1", "--set f.txt a=1"),
        ("f.txt --set", "f.txt --set"),
        ("--set a=1 -- --set b=2", "--set=a=1 -- --set b=2"),
        ("--author a=1 f.txt", "--author a=1 f.txt"),
        ("", ""),
    ],
)
def test_settings_end_where_no_key_follows(words, ended):
    assert end_settings(words.split()) == ended.split()


def test_what_is_set_wins_over_the_file(tmp_path):
    file = tmp_path / "sizes.yaml"
    file.write_text("a: 5\nb: 6\n")
    assert read_config(Sizes, parsed("--config", str(file), "--set", "a=1")) == Sizes(a=1, b=6)


def test_a_parser_that_was_used_before_has_no_keys_left():
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    parser.parse_args(["--set", "a=1"])
    assert parser.parse_args([]).overrides == []


def test_an_error_is_one_line_and_its_status(capsys):
    def fail() -> int:
        raise ConfigError("no")

    assert run_command("command", None, fail) == 2
    assert capsys.readouterr() == ("", "command: no\n")


def test_an_interrupt_is_status_130(capsys):
    def interrupt() -> int:
        raise KeyboardInterrupt

    assert run_command("command", None, interrupt) == 130
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("command: interrupted")


def test_a_bug_keeps_its_traceback():
    def fail() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command("command", None, fail)


def test_a_result_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    worked = []
    target = str(tmp_path / "none" / "result.json")
    assert run_command("command", target, lambda: worked.append(1) or 0) == 2
    assert not worked
    assert f"--json {target}" in capsys.readouterr().err


def test_a_folder_is_no_file_to_write(tmp_path):
    check_writable("--html", tmp_path / "new.html")
    with pytest.raises(InputError, match="--html"):
        check_writable("--html", tmp_path)


def test_json_is_one_line(tmp_path, capsys):
    write_json("-", {"a": "ü\n"})
    write_json(None, {"a": 2})
    write_json(str(tmp_path / "result.json"), {"a": 3})
    assert json.loads(capsys.readouterr().out) == {"a": "ü\n"}
    assert (tmp_path / "result.json").read_text() == '{"a": 3}\n'


def test_json_that_cannot_be_written_is_an_error(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write_json(str(tmp_path), {})


def run_script(script: str, **options) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_a_reader_that_has_gone_is_no_error():
    process = run_script(
        "import sys\n"
        "from megacontext.cli.output import run_command\n"
        "def run():\n"
        "    for _ in range(100_000):\n"
        "        sys.stdout.write('text\\n')\n"
        "    return 0\n"
        "sys.exit(run_command('command', None, run))\n"
    )
    process.stdout.read(5)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_text_that_the_terminal_cannot_show_is_no_error():
    process = run_script(
        "import sys\n"
        "from megacontext.cli.output import run_command\n"
        "sys.exit(run_command('command', None, lambda: sys.stdout.write('a\\u2026b') and 0))\n",
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, b"a?b", b"")
