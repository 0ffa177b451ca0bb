"""``megacontext forget``: takes sources out of a memory for good."""

from __future__ import annotations

import argparse
import sys

from megacontext.cli.output import console, read_config, token_progress, write_json
from megacontext.runtime.forget import forget
from megacontext.runtime.session import Session, SessionConfig


def run_forget(arguments: argparse.Namespace) -> int:
    """Writes the memory anew without the named sources."""
    with Session(read_config(SessionConfig, arguments)) as session, token_progress() as progress:
        task = progress.add_task("tokens", total=None)
        done = forget(
            session.base,
            arguments.memory,
            arguments.source,
            session.gistnet,
            session.lens,
            lambda count, total: progress.update(task, completed=count, total=total),
            resident_mb=session.config.resident_mb,
        )
    for copy in done.copies:
        sys.stderr.write(
            f"megacontext: {copy} was not looked into and may still hold it; remove it yourself\n"
        )
    forgotten = sum(source.end - source.start for source in done.sources)
    if done.sources:
        said = f"{len(done.sources)} sources with {forgotten:,} tokens forgotten"
    else:
        said = "a forgetting that was cut off is finished"
    console.print(f"{arguments.memory}: {said}; {done.n_tokens:,} tokens stay")
    write_json(
        arguments.json,
        {
            "sources": [source.uri for source in done.sources],
            "forgotten": forgotten,
            "tokens": done.n_tokens,
            "copies": [str(copy) for copy in done.copies],
        },
    )
    return 0
