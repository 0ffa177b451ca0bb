"""However often bulk ingest is cut off: the same call, repeated, makes the undisturbed memory."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from engine_cases import config, contents, new_engine, words
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_base_model

from megacontext.memory import Memory, Source
from megacontext.runtime.bulk_ingest import Document, ingest_documents
from megacontext.runtime.engine import Engine

BASE = tiny_base_model(max_positions=256)


class Cut(Exception):
    """Stands for whatever ends a process."""


def documents(sizes: list[int]) -> list[Document]:
    texts = [words(size, seed=n) for n, size in enumerate(sizes)]
    return [
        Document(
            Source(f"file:///{n}", sha256=hashlib.sha256(text.encode()).hexdigest()),
            lambda text=text: [text],
        )
        for n, text in enumerate(texts)
    ]


def said(memory: Memory) -> tuple:
    sources = [(s.id, s.uri, s.sha256, s.start, s.end, s.complete) for s in memory.sources()]
    return contents(memory), sources


def cut_off(
    folder: Path, path: Path, wanted: list[Document], commits: int, *, killed: bool
) -> bool:
    """Ingests until some commits are done; whether that was the end of it.

    A process that is killed leaves the files as they lie on disk at that moment, while the writer
    has them open: a copy of these takes the memory's place.
    """
    with Memory.open(path, "a") as memory:
        engine = Engine(BASE, memory, config=config(chunk_tokens=64))

        def progress(*_: int) -> None:
            nonlocal commits
            commits -= 1
            if not commits:
                if killed:
                    shutil.copytree(path, folder / "killed")
                raise Cut

        try:
            ingest_documents(engine.ingestor, wanted, readers=2, progress=progress)
        except Cut:
            pass
        else:
            return True
    if killed:
        shutil.rmtree(path)
        (folder / "killed").rename(path)
    return False


@settings(max_examples=8, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    cuts=st.lists(st.tuples(st.integers(1, 8), st.booleans()), max_size=3),
)
def test_cut_off_anywhere_and_repeated_it_is_as_if_undisturbed(sizes, cuts):
    wanted = documents(sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = new_engine(folder, BASE, name="whole", config=config(chunk_tokens=64))
        with whole.memory as memory:
            ingest_documents(whole.ingestor, wanted)
            expected = said(memory)
        path = folder / "cut.mctx"
        Memory.create(path, whole.memory.identity).close()
        for commits, killed in cuts:
            if cut_off(folder, path, wanted, commits, killed=killed):
                break
        with Memory.open(path, "a") as memory:
            assert memory.verify().ok
            engine = Engine(BASE, memory, config=config(chunk_tokens=64))
            ingest_documents(engine.ingestor, wanted)
            assert said(memory) == expected
            ingest_documents(engine.ingestor, wanted)
            assert said(memory) == expected
