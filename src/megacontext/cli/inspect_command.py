"""``megacontext inspect``, ``stats``, ``verify`` and ``repair``: what a memory holds."""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict
from typing import Any

from rich.table import Table

from megacontext.cli.output import console, read_config, token_progress, write_json
from megacontext.errors import InputError, MemoryMismatchError
from megacontext.memory import Memory

_FOUND_BLOCKS = 8
_MOST_DIGITS = 18


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
            result["text"] = _decoded(memory, base, *span)
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
    table.add_column("per token", justify="right")
    for part, size in _parts(stats):
        table.add_row(part, f"{size:,}", f"{size / max(1, stats['tokens']):.3f}")
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


def run_repair(arguments: argparse.Namespace) -> int:
    """Makes a damaged memory anew from its tokens; status 2 where they are damaged too."""
    from megacontext.runtime.repair import repair
    from megacontext.runtime.session import Session, SessionConfig

    config = read_config(SessionConfig, arguments)
    if Memory.verify_path(arguments.memory).ok:
        console.print(f"{arguments.memory}: nothing is damaged")
        write_json(arguments.json, {"repaired": False})
        return 0
    with Session(config) as session, token_progress() as progress:
        task = progress.add_task("tokens", total=None)
        done = repair(
            session.base,
            arguments.memory,
            session.gistnet,
            session.lens,
            lambda count, total: progress.update(task, completed=count, total=total),
            resident_mb=config.resident_mb,
        )
    for doubt in done.doubts:
        sys.stderr.write(f"megacontext: {doubt}\n")
    console.print(
        f"{arguments.memory}: {done.n_tokens:,} tokens kept, all else made anew; "
        f"the damaged memory is {done.damaged}"
    )
    write_json(
        arguments.json,
        {
            "repaired": True,
            "tokens": done.n_tokens,
            "damaged": str(done.damaged),
            "doubts": list(done.doubts),
        },
    )
    return 0


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


def _decoded(memory: Memory, base: Any, start: int, stop: int) -> str:
    tokens = memory.tokens(start, stop)
    if len(tokens) and int(tokens.max()) >= base.vocab_size:
        raise InputError(
            f"{memory.path}: tokens {start} to {stop} are not all of {base.name}, which has 0 to "
            f"{base.vocab_size - 1}; the program that stored them used another vocabulary"
        )
    return base.decode(tokens)


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
        words = _decoded(memory, base, block * size, (block + 1) * size)
        found.append({"block": block, "start": block * size, "score": score, "text": words})
        sys.stdout.write(f"{block * size:>12,}  {score:8.3f}  {' '.join(words.split())}\n")
    return found


def _parts(stats: dict[str, Any]) -> list[tuple[str, int]]:
    """Bytes by part, and below a part with several levels those of each."""
    rows: list[tuple[str, int]] = []
    for part, size in stats["bytes"].items():
        rows.append((part, size))
        levels = [
            (f"  {name}", of) for name, of in stats["level_bytes"].items() if name.startswith(part)
        ]
        rows += levels if len(levels) > 1 else []
    return rows


def _span(text: str, limit: int) -> tuple[int, int]:
    start, separator, stop = text.partition(":")
    if not separator or not re.fullmatch("[0-9]+", start) or not re.fullmatch("[0-9]+", stop):
        raise InputError(f"--tokens {text}: expected START:STOP, for example 0:64")
    # Python does not read numbers of thousands of digits.
    if max(len(start), len(stop)) > _MOST_DIGITS or not int(start) <= int(stop) <= limit:
        raise InputError(f"--tokens {text[:80]}: the memory holds tokens 0 to {limit}")
    return int(start), int(stop)
