"""``megacontext inspect``, ``stats`` and ``verify``: commands that only read a memory."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from rich.table import Table

from megacontext.cli.output import console, read_config, write_json
from megacontext.errors import InputError, MemoryMismatchError
from megacontext.memory import Memory

_FOUND_BLOCKS = 8


def run_inspect(arguments: argparse.Namespace) -> int:
    """Shows sources, a span's text, or what BM25 finds."""
    with Memory.open(arguments.memory) as memory:
        result: dict[str, Any] = {"identity": asdict(memory.identity), "tokens": memory.n_tokens}
        show_text = arguments.tokens is not None or arguments.search is not None
        span = None if arguments.tokens is None else _span(arguments.tokens, memory.n_tokens)
        base = _tokenizing_model(arguments, memory, load=show_text)
        if not show_text:
            result["sources"] = [asdict(source) for source in memory.sources()]
            _print_sources(memory)
        if span is not None:
            result["text"] = base.decode(memory.tokens(*span))
            sys.stdout.write(result["text"] + "\n")
        if arguments.search is not None:
            result["found"] = _search(memory, base, arguments.search)
    write_json(arguments.json, result)
    return 0


def run_stats(arguments: argparse.Namespace) -> int:
    """Prints sizes."""
    with Memory.open(arguments.memory) as memory:
        stats = memory.stats()
    table = Table(title=str(arguments.memory), title_justify="left")
    table.add_column("part")
    table.add_column("bytes", justify="right")
    for part, size in stats["bytes"].items():
        table.add_row(part, f"{size:,}")
    console.print(table)
    levels = ", ".join(f"L{level}: {count:,}" for level, count in enumerate(stats["levels"]))
    console.print(f"{levels}; {stats['bytes_per_token']:.1f} bytes per token")
    write_json(arguments.json, stats)
    return 0


def run_verify(arguments: argparse.Namespace) -> int:
    """Checks every byte; status 2 and a line per problem where something is wrong."""
    report = Memory.verify_path(arguments.memory)
    for problem in report.problems:
        sys.stderr.write(f"megacontext: {problem}\n")
    if report.ok:
        console.print(
            f"{arguments.memory}: {report.checked_bytes:,} bytes checked, all as committed"
        )
    write_json(
        arguments.json,
        {
            "ok": report.ok,
            "checked_bytes": report.checked_bytes,
            "problems": [str(problem) for problem in report.problems],
        },
    )
    return 0 if report.ok else 2


def _tokenizing_model(arguments: argparse.Namespace, memory: Memory, *, load: bool) -> Any:
    """The base model whose tokenizer made the memory's tokens, whatever made its gists."""
    from megacontext.runtime.session import SessionConfig

    config = read_config(SessionConfig, arguments)
    if not load:
        return None
    from megacontext.runtime.base_model import BaseModel

    base = BaseModel.from_pretrained(config.model, dtype=config.dtype, device=config.device)
    if base.tokenizer_hash != memory.identity.tokenizer_hash:
        raise MemoryMismatchError(
            f"{memory.path}: its tokens were made by {memory.identity.base_model}, not by "
            f"{config.model}; name that model with --set model=…"
        )
    return base


def _print_sources(memory: Memory) -> None:
    table = Table(title=f"{memory.path}: {memory.n_tokens:,} tokens", title_justify="left")
    for column in ("id", "tokens", "source", "author", "tags"):
        # A path is of use in full only.
        table.add_column(column, overflow="fold")
    for source in memory.sources():
        table.add_row(
            str(source.id),
            f"{source.start:,}–{source.end:,}",
            source.uri,
            source.author,
            ", ".join(source.tags),
        )
    console.print(table)


def _search(memory: Memory, base: Any, text: str) -> list[dict[str, Any]]:
    blocks, scores = memory.search_blocks(text, _FOUND_BLOCKS)
    size = memory.identity.block_size
    found: list[dict[str, Any]] = []
    for block, score in zip(blocks.tolist(), scores.tolist(), strict=True):
        words = base.decode(memory.tokens(block * size, (block + 1) * size))
        found.append({"block": block, "start": block * size, "score": score, "text": words})
        sys.stdout.write(f"{block * size:>12,}  {score:8.3f}  {' '.join(words.split())}\n")
    return found


def _span(text: str, limit: int) -> tuple[int, int]:
    start, separator, stop = text.partition(":")
    if not separator or not start.isdecimal() or not stop.isdecimal():
        raise InputError(f"--tokens {text}: expected START:STOP, for example 0:64")
    if not int(start) <= int(stop) <= limit:
        raise InputError(f"--tokens {text}: the memory holds tokens 0 to {limit}")
    return int(start), int(stop)
