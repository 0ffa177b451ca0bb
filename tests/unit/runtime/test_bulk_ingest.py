from __future__ import annotations

import hashlib

import pytest
from engine_cases import config, contents, new_engine, words

from megacontext.errors import InputError
from megacontext.memory import Memory, Source
from megacontext.runtime.bulk_ingest import Document, ingest_documents
from megacontext.runtime.engine import Engine

SIZES = (700, 3, 0, 90, 64, 1, 300)


class Cut(Exception):
    """Stands for whatever ends a process."""


def document(name: str, text: str) -> Document:
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Document(Source(uri=f"file:///{name}", sha256=digest), lambda: [text], len(text))


def documents(sizes=SIZES) -> list[Document]:
    return [document(str(n), words(size, seed=n)) for n, size in enumerate(sizes)]


@pytest.fixture
def engine(tmp_path):
    engine = new_engine(tmp_path, config=config(chunk_tokens=64))
    yield engine
    engine.memory.close()


def cut_after(tokens: int):
    def progress(count: int, _: int) -> None:
        nonlocal tokens
        tokens -= count
        if tokens <= 0:
            raise Cut

    return progress


def places(memory: Memory) -> list[tuple]:
    return [(s.uri, s.start, s.end, s.complete) for s in memory.sources()]


def test_short_documents_share_commits_and_say_what_a_stream_says(tmp_path, engine):
    told: list[tuple[int, int]] = []
    done = ingest_documents(
        engine.ingestor, documents(), readers=3, progress=lambda *counts: told.append(counts)
    )
    total = sum(SIZES)
    assert [item.tokens for item in done] == list(SIZES)
    assert [item.start for item in done] == [sum(SIZES[:n]) for n in range(len(SIZES))]
    assert engine.memory.generation == -(-total // 64)
    assert [sum(column) for column in zip(*told, strict=True)] == [total, total]
    assert [s.uri for s in engine.memory.sources()] == [
        f"file:///{n}" for n, size in enumerate(SIZES) if size
    ]
    other = new_engine(tmp_path, name="b")
    for n, size in enumerate(SIZES):
        other.ingest(words(size, seed=n), Source(f"file:///{n}"))
    assert contents(engine.memory) == contents(other.memory)
    assert [s[1:] for s in places(engine.memory)] == [s[1:] for s in places(other.memory)]
    other.memory.close()


def test_what_is_complete_is_skipped_unless_asked_for_again(engine):
    ingest_documents(engine.ingestor, documents())
    before = contents(engine.memory)
    told: list[int] = []
    changed = document("1", "abc")
    done = ingest_documents(
        engine.ingestor,
        [*documents(), changed, changed],
        progress=lambda _, size: told.append(size),
    )
    assert [item.skipped for item in done] == [size > 0 for size in SIZES] + [False, True]
    assert done[-2].tokens == 3
    assert sum(told) == sum(SIZES) + 6
    again = ingest_documents(engine.ingestor, documents(), again=True)
    assert [item.tokens for item in again] == list(SIZES)
    assert engine.memory.n_tokens == 2 * sum(SIZES) + 3
    assert engine.memory.tokens(0, sum(SIZES)).tolist() == before["tokens"]


@pytest.mark.parametrize("cut", [1, 65, 640, 700, 760, 1150])
def test_a_call_that_was_cut_off_is_finished_by_the_next(tmp_path, engine, cut):
    whole = new_engine(tmp_path, name="whole", config=config(chunk_tokens=64))
    ingest_documents(whole.ingestor, documents())
    with pytest.raises(Cut):
        ingest_documents(engine.ingestor, documents(), progress=cut_after(cut))
    there = engine.memory.n_tokens
    assert 0 < there < whole.memory.n_tokens
    done = ingest_documents(engine.ingestor, documents())
    assert sum(item.tokens for item in done) == whole.memory.n_tokens - there
    assert contents(engine.memory) == contents(whole.memory)
    assert places(engine.memory) == places(whole.memory)
    assert all(source.complete for source in engine.memory.sources())
    whole.memory.close()


def test_a_text_goes_on_behind_what_has_followed_it(engine):
    (first, *_), text = documents(), words(700, seed=0)
    for cut, other in ((64, "b"), (128, "c")):
        with pytest.raises(Cut):
            ingest_documents(engine.ingestor, [first], progress=cut_after(cut))
        ingest_documents(engine.ingestor, [document(other, other * 10)])
    (done,) = ingest_documents(engine.ingestor, [first], again=True)
    assert (done.known, done.tokens) == (192, 508)
    assert places(engine.memory) == [
        ("file:///0", 0, 64, True),
        ("file:///b", 64, 74, True),
        ("file:///0", 74, 202, True),
        ("file:///c", 202, 212, True),
        ("file:///0", 212, 720, True),
    ]
    memory = engine.memory
    ranges = [(s.start, s.end) for s in memory.sources() if s.uri == "file:///0"]
    tokens = [token for start, end in ranges for token in memory.tokens(start, end).tolist()]
    assert tokens == engine.base.encode(text).tolist()
    (done,) = ingest_documents(engine.ingestor, [first])
    assert done.skipped


@pytest.mark.parametrize("text", ["x" * 700, words(64, seed=0), words(60, seed=0), ""])
def test_a_text_that_makes_other_tokens_now_is_refused(engine, text):
    (first, *_) = documents()
    with pytest.raises(Cut):
        ingest_documents(engine.ingestor, [first], progress=cut_after(64))
    other = Document(first.source, lambda: [text])
    with pytest.raises(InputError, match=r"64 tokens of it were taken in before.*forget"):
        ingest_documents(engine.ingestor, [other])
    assert engine.memory.n_tokens == 64


def test_a_document_that_breaks_off_stays_incomplete(engine):
    def torn():
        yield words(64 * 3000)
        raise InputError("torn")

    broken = Document(Source("file:///torn", sha256="1"), torn)
    with pytest.raises(InputError, match="torn"):
        ingest_documents(engine.ingestor, [broken, *documents()])
    (source,) = engine.memory.sources()
    assert not source.complete
    assert source.end == engine.memory.n_tokens


def test_a_stream_without_a_hash_is_always_taken_in(engine):
    stream = Document(Source("stdin:"), lambda: ["abc"], waits=True)
    for count in (1, 2):
        done = ingest_documents(engine.ingestor, [*documents(), stream, *documents()])
        assert all(item.skipped for item in done[len(SIZES) + 1 :])
        assert done[len(SIZES)].tokens == 3
        assert engine.memory.n_tokens == sum(SIZES) + 3 * count


def test_a_text_that_fails_midway_keeps_what_came_before(engine: Engine):
    def torn():
        yield words(64 * 3000)
        raise Cut

    with pytest.raises(Cut):
        engine.ingest(torn(), Source("x"))
    (source,) = engine.memory.sources()
    assert not source.complete
    engine.ingest(words(3), Source("y"))
    assert engine.memory.sources()[1].complete
