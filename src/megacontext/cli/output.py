"""What all commands share: options, JSON lines, progress bars, one line per error."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megacontext.config import ConfigT, load_config
from megacontext.errors import InputError, MegaContextError

# Pictures and progress go to standard error, so that standard output can be piped.
console = Console(stderr=True)

_INTERRUPTED = 130
_STDOUT = "-"
_SETTING = re.compile(r"[A-Za-z_][\w.-]*=")


def run_command(prefix: str, json_target: str | None, run: Callable[[], int]) -> int:
    """Runs a command and turns what a caller can cause into one line and an exit status.

    Args:
        prefix: begins the line.
        json_target: value of ``--json``; refused before the work starts if it cannot be written.
        run: the command; returns its exit status.

    Returns:
        The status of ``run``, that of the error, 130 if interrupted, 0 if nobody reads on.
    """
    for stream in (sys.stdout, sys.stderr):
        # What a model writes may not exist in the terminal's encoding; that is no reason to end.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if json_target not in (None, _STDOUT):
            check_writable("--json", Path(json_target))
        status = run()
        sys.stdout.flush()
    except MegaContextError as error:
        sys.stderr.write(f"{prefix}: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"{prefix}: interrupted; everything committed so far is kept\n")
        return _INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone, which is its right; the flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument(
        "--json", metavar="-|FILE", help="write the result as one JSON line to stdout or a file"
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """``--config``, ``--set`` and ``--json``."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML configuration")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override keys, for example engine.budget=2048; may be repeated",
    )
    add_json_option(parser)


def end_settings(words: Sequence[str]) -> list[str]:
    """Ends ``--set`` behind its last ``KEY=VALUE``: of ``--set a=1 b=2 FILE`` it leaves FILE alone.

    Args:
        words: of a command line, before it is parsed.
    """
    ended: list[str] = []
    setting = False
    for number, word in enumerate(words):
        if word == "--":
            return [*ended, *words[number:]]
        if setting and _SETTING.match(word):
            ended.append(f"--set={word}")
            continue
        # What follows a bare --set is no setting; the parser says so.
        setting = word == "--set" and any(map(_SETTING.match, words[number + 1 : number + 2]))
        if not setting:
            ended.append(word)
    return ended


def read_config(config_type: type[ConfigT], arguments: argparse.Namespace) -> ConfigT:
    """The configuration that the options of :func:`add_config_options` ask for.

    Raises:
        ConfigError: a key or value is not allowed.
    """
    return load_config(config_type, arguments.config, arguments.overrides)


def check_writable(option: str, path: Path) -> None:
    """Refuses, before hours of work, a file that could not be written after them.

    Raises:
        InputError: the file is a folder, or lies in none, or in one that is closed to us.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{option} {path}: not a file in an existing folder")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{option} {path}: writing is not allowed there")


def write_json(target: str | None, result: Mapping[str, Any]) -> None:
    """Writes one JSON line to standard output (``-``) or to a file; nothing if ``target`` is None.

    Raises:
        InputError: the file cannot be written.
    """
    if target is None:
        return
    line = json.dumps(result)
    if target == _STDOUT:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        return
    try:
        Path(target).write_text(line + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--json {target}: cannot be written: {error.strerror}") from None


def hide_loading_bars() -> None:
    """Turns off transformers' bar per loaded model; bars of downloads from the hub stay."""
    if "transformers" not in sys.modules:
        return
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    hub_is_quiet = are_progress_bars_disabled()
    disable_progress_bar()
    if not hub_is_quiet:
        enable_progress_bars()


def token_progress() -> Progress:
    """A progress bar that counts tokens; shown on terminals only."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def byte_progress() -> Progress:
    """A progress bar over bytes that also tells tokens and their rate; shown on terminals only.

    Its task needs the fields ``tokens`` and ``rate``.
    """
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TextColumn("{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f}/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def live_picture() -> Generator[Callable[[RenderableType], None]]:
    """Gives a function that shows a picture in place of the one before: on terminals only."""
    if not console.is_terminal:
        yield lambda _: None
        return
    with Live(console=console, refresh_per_second=8, transient=True) as live:
        # Drawn at once: a short run would end before the timer's next tick.
        yield lambda picture: live.update(picture, refresh=True)
