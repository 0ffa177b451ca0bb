"""The command line: every command, its options, and the function that runs it.

Functions are named, not imported, so that ``--help`` and a mistyped option need not wait for torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from megacontext import __version__
from megacontext.cli.output import add_config_options, add_json_option

_DEMO = "megacontext.cli.demo_command"
_FORGET = "megacontext.cli.forget_command"
_INGEST = "megacontext.cli.ingest_command"
_INSPECT = "megacontext.cli.inspect_command"
_TALK = "megacontext.cli.talk_commands"
_BENCH = "megacontext.cli.bench_command"


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; ``run`` of what it parses is ``MODULE:FUNCTION``."""
    parser = argparse.ArgumentParser(
        prog="megacontext",
        description="A memory without end, on disk, for any frozen Hugging Face causal LM.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"megacontext {__version__}")
    parser.add_argument("--log-level", default="warning", metavar="LEVEL", help="default: warning")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_memory_commands(commands)
    _add_talk_commands(commands)
    _add_bench(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = _command(
        commands, "demo", "stream a book through a small window and ask", f"{_DEMO}:run"
    )
    add_config_options(demo)
    demo.add_argument(
        "--html",
        type=Path,
        default=Path("demo_focus.html"),
        metavar="FILE",
        help="where the playback of the focus is written (default: demo_focus.html)",
    )
    demo.add_argument("--memory", type=Path, metavar="DIR", help="keep the memory here")


def _add_memory_commands(commands: Any) -> None:
    _add_ingest(commands)
    inspect = _on_memory(
        commands, "inspect", "show sources, and the text of a span", f"{_INSPECT}:run_inspect"
    )
    inspect.add_argument("--tokens", metavar="START:STOP", help="show the text of these tokens")
    inspect.add_argument("--search", metavar="TEXT", help="show the blocks BM25 finds for a text")
    add_config_options(inspect)
    stats = _on_memory(commands, "stats", "sizes of a memory", f"{_INSPECT}:run_stats")
    add_json_option(stats)
    verify = _on_memory(
        commands,
        "verify",
        "check every byte of a memory against its checksums",
        f"{_INSPECT}:run_verify",
    )
    add_json_option(verify)
    repair = _on_memory(
        commands,
        "repair",
        "make a damaged memory anew from its tokens",
        f"{_INSPECT}:run_repair",
    )
    add_config_options(repair)
    forget = _on_memory(
        commands, "forget", "take sources out of a memory for good", f"{_FORGET}:run_forget"
    )
    forget.add_argument(
        "--source",
        action="append",
        required=True,
        metavar="URI",
        help="as `inspect` shows it, or the path of a file; may be repeated",
    )
    add_config_options(forget)
    regist = _on_memory(
        commands,
        "regist",
        "rebuild the gists for the configured models",
        f"{_INGEST}:run_regist",
    )
    add_config_options(regist)


def _add_ingest(commands: Any) -> None:
    ingest = _on_memory(
        commands, "ingest", "append files and folders to a memory", f"{_INGEST}:run_ingest"
    )
    ingest.add_argument(
        "files", nargs="+", metavar="FILE", help="UTF-8 text, or a folder; - is standard input"
    )
    ingest.add_argument(
        "--pattern",
        action="append",
        default=[],
        metavar="NAME",
        help="take only such files from folders, for example '*.md'; may be repeated",
    )
    ingest.add_argument(
        "--again", action="store_true", help="take in once more what is there already, unchanged"
    )
    ingest.add_argument("--author", default="", help="recorded with every file")
    ingest.add_argument("--tag", action="append", default=[], help="recorded with every file")
    add_config_options(ingest)


def _add_talk_commands(commands: Any) -> None:
    for name, text in (
        ("ask", "answer one question from a memory"),
        ("chat", "talk with a model that remembers"),
    ):
        parser = _command(commands, name, text, f"{_TALK}:run_{name}")
        parser.add_argument("--memory", type=Path, required=True, metavar="DIR")
        if name == "ask":
            parser.add_argument("question", metavar="QUESTION")
            parser.add_argument("--explain", action="store_true", help="show what was in focus")
        parser.add_argument("--model", help="short for --set model=…")
        parser.add_argument(
            "--focus", metavar="POLICY", help="lexical, attention, …; short for --set policy=…"
        )
        add_config_options(parser)


def _add_bench(commands: Any) -> None:
    bench: argparse.ArgumentParser = commands.add_parser(
        "bench", help="measure; every suite ends with one JSON line", allow_abbrev=False
    )
    suites = bench.add_subparsers(dest="suite", required=True, metavar="SUITE")
    for name, text in (
        ("base", "what the base model answers from its window"),
        ("ingest", "speed and memory of taking in a million tokens"),
        ("substitution", "what reading gists in place of tokens costs"),
        ("focus", "whether the focus finds what a question needs"),
        ("cost", "what a memory costs beside the base alone, and how flat that is"),
        ("proof", "side by side with what a user would pick instead, at equal budget"),
    ):
        parser = _command(suites, name, text, f"{_BENCH}:run_{name}")
        parser.add_argument("--quick", action="store_true", help="smaller samples")
        if name == "focus":
            parser.add_argument("--lengths", metavar="LIST", help="of the histories: 4k,32k,1m")
            parser.add_argument("--policies", metavar="LIST", help="to compare: lexical,lens")
        if name in ("substitution", "focus", "proof"):
            parser.add_argument(
                "--report", type=Path, metavar="FOLDER", help="write a page and a picture there"
            )
        add_config_options(parser)


def _command(commands: Any, name: str, text: str, run: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _on_memory(commands: Any, name: str, text: str, run: str) -> argparse.ArgumentParser:
    parser = _command(commands, name, text, run)
    parser.add_argument("memory", type=Path, metavar="MEMORY", help="directory, NAME.mctx")
    return parser
