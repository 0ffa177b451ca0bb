"""Every command in the documentation is one that exists, and what is quick there runs."""

from __future__ import annotations

import argparse
import importlib
import io
import re
import shlex
import shutil
import sys
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from architecture.repository import ROOT, text_lines, tracked_files

from megacontext.cli.main import main
from megacontext.cli.parser import build_parser
from megacontext.cli.talk_commands import TalkConfig
from megacontext.config import FrozenConfig, load_config
from megacontext.evaluation.base_suite import BaseSuiteConfig
from megacontext.evaluation.cost_config import CostSuiteConfig
from megacontext.evaluation.demo import DemoConfig
from megacontext.evaluation.focus_config import FocusSuiteConfig
from megacontext.evaluation.ingest_suite import IngestSuiteConfig
from megacontext.evaluation.proof_config import ProofSuiteConfig
from megacontext.evaluation.substitution_suite import SubstitutionSuiteConfig
from megacontext.runtime.session import SessionConfig

CONFIG_TYPES: dict[str, type[FrozenConfig]] = {
    "demo": DemoConfig,
    "ingest": SessionConfig,
    "inspect": SessionConfig,
    "regist": SessionConfig,
    "repair": SessionConfig,
    "forget": SessionConfig,
    "ask": TalkConfig,
    "chat": TalkConfig,
    "bench base": BaseSuiteConfig,
    "bench ingest": IngestSuiteConfig,
    "bench substitution": SubstitutionSuiteConfig,
    "bench focus": FocusSuiteConfig,
    "bench cost": CostSuiteConfig,
    "bench proof": ProofSuiteConfig,
}
# Quick commands that need nothing but what came before them in the same file.
QUICK = {"ingest", "inspect", "stats", "verify", "forget", "regist", "ask", "chat"}
NEEDS_MORE = ("--model", "gistnet=", "lens=", "model=")


def documents() -> list[Path]:
    return [
        path
        for path in tracked_files()
        if path.suffix == ".md" and (len(path.parts) == 1 or path.parts[0] == "docs")
    ]


def shell_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines of the ``sh`` blocks of a Markdown file, joined where they end with a backslash."""
    fence, held = "", ""
    for number, line in enumerate(text_lines(path), start=1):
        mark = line.strip()
        if mark.startswith("```"):
            fence = "" if fence else mark.removeprefix("```").strip() or "text"
        elif fence in ("sh", "bash", "shell", "console"):
            held += line.strip().removeprefix("$ ")
            if held.endswith("\\"):
                held = held[:-1]
                continue
            if held:
                yield number, held
            held = ""


def commands() -> list[tuple[str, list[str]]]:
    """Where each simple command stands, and its words without ``./bootstrap`` and assignments."""
    found: list[tuple[str, list[str]]] = []
    for path in documents():
        for number, line in shell_lines(path):
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("|&;"):
                    found.append((f"{path}:{number}", bare(words)))
                    words = []
                else:
                    words.append(word)
    return [(where, words) for where, words in found if words]


def bare(words: list[str]) -> list[str]:
    """A command's own words."""
    while words and (
        words[0] == "./bootstrap" or words[:2] == ["uv", "run"] or re.match(r"[A-Z_]+=", words[0])
    ):
        words = words[2:] if words[0] == "uv" else words[1:]
    for index, word in enumerate(words):
        if set(word) <= set("<>"):
            return words[:index]
    if words[:3] == ["python", "-m", "megacontext"]:
        return words[2:]
    if words[:3] == ["python", "-m", "tools.bench"]:
        return ["megacontext", "bench", *words[3:]]
    return words


def ours(name: str) -> list[tuple[str, list[str]]]:
    return [(where, words) for where, words in commands() if words[0] == name]


def tool_commands() -> list[tuple[str, list[str]]]:
    return [
        (where, words[2:])
        for where, words in commands()
        if words[:2] == ["python", "-m"] and words[2].startswith("tools.")
    ]


def suite_of(arguments: argparse.Namespace) -> str:
    return " ".join(filter(None, (arguments.command, getattr(arguments, "suite", None))))


def tool_config(module: str) -> type[FrozenConfig]:
    return typing.get_type_hints(importlib.import_module(module).run)["config"]


def check_settings(config_type, config: Path | None, overrides: list[str]) -> None:
    load_config(config_type, None if config is None else ROOT / config, overrides)


@cache
def subparsers() -> dict[str, argparse.ArgumentParser]:
    """Every command's parser by name; that of a suite by both words."""

    def children(parser, prefix) -> Iterator[tuple[str, argparse.ArgumentParser]]:
        groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not groups:
            yield prefix, parser
        for group in groups:
            for name, child in group.choices.items():
                yield from children(child, f"{prefix} {name}".strip())

    return dict(children(build_parser(), ""))


def test_there_are_commands_to_check():
    assert ours("megacontext")
    assert tool_commands()


@pytest.mark.parametrize(("where", "words"), ours("megacontext"), ids=str)
def test_a_documented_command_exists(where, words):
    if words[1:] == ["--version"] or words[-1] == "--help":
        with pytest.raises(SystemExit) as exit_:
            build_parser().parse_args(words[1:])
        assert exit_.value.code == 0, where
        return
    arguments = build_parser().parse_args(words[1:])
    if hasattr(arguments, "overrides"):
        check_settings(CONFIG_TYPES[suite_of(arguments)], arguments.config, arguments.overrides)


@pytest.mark.parametrize(("where", "words"), tool_commands(), ids=str)
def test_a_documented_tool_exists(where, words):
    from tools._entry import tool_parser

    arguments = tool_parser("").parse_args(words[1:])
    check_settings(tool_config(words[0]), arguments.config, arguments.overrides)


def test_every_scripts_path_in_a_command_exists():
    for where, words in commands():
        if (
            words[0] in ("python", ".ci/run")
            and not words[-1].startswith("-")
            and "-m" not in words
        ):
            script = words[1] if words[0] == "python" else words[0]
            assert (ROOT / script).is_file(), f"{where}: {script}"


@pytest.mark.parametrize("name", [*subparsers()])
def test_every_command_has_its_settings_checked(name):
    takes_settings = "--set" in subparsers()[name]._option_string_actions
    assert takes_settings == (name in CONFIG_TYPES)


@pytest.mark.parametrize("name", [*subparsers()])
def test_every_command_and_option_is_documented(name):
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert f"megacontext {name}" in page
    for option in subparsers()[name]._option_string_actions:
        assert option == "-h" or option in page, f"docs/commands.md lacks {option} of {name}"


def test_every_tool_is_documented():
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    for path in tracked_files():
        if path.parts[0] == "tools" and not path.name.startswith("_"):
            assert f"python -m tools.{path.stem}" in page, path


def settable(config_type: type[FrozenConfig]) -> set[str]:
    """All keys of a configuration, nested ones with dots."""
    keys: set[str] = set()
    for name, field in config_type.model_fields.items():
        keys.add(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, FrozenConfig):
            keys |= {f"{name}.{key}" for key in settable(field.annotation)}
    return keys


def test_every_key_that_prose_sets_exists():
    tools = {words[0] for _, words in tool_commands()}
    known = set[str]().union(
        *map(settable, CONFIG_TYPES.values()), *(settable(tool_config(tool)) for tool in tools)
    )
    for path in documents():
        for number, line in enumerate(text_lines(path), start=1):
            for key in re.findall(r"--set[ =]([a-z][\w.]*)=", line):
                assert key in known, f"{path}:{number}: --set {key}=…"


def runnable(path: Path) -> list[list[str]]:
    return [
        words[1:]
        for where, words in ours("megacontext")
        if where.startswith(f"{path}:")
        and words[1] in QUICK
        and not any(word.startswith(NEEDS_MORE) for word in words)
    ]


@pytest.mark.parametrize("path", [path for path in documents() if runnable(path)], ids=str)
def test_quick_commands_run_as_they_stand(path, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n\n"))
    for words in runnable(path):
        expanded = [
            name
            for word in words
            for name in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
        ]
        status = main(expanded)
        assert status == 0, (words, capsys.readouterr().err)
