"""Sources that share an append, and sources that an append leaves incomplete."""

from __future__ import annotations

import json

import pytest

from megacontext.errors import CorruptMemoryError, InvariantError
from megacontext.memory import Memory, Source, SourcePart
from megacontext.memory.catalog_rows import UNFINISHED


def places(memory: Memory) -> list[tuple]:
    return [(s.uri, s.start, s.end, s.complete) for s in memory.sources()]


def test_several_sources_share_one_commit(make):
    feeder = make()
    memory = feeder.memory
    first, second = (memory.begin_source(Source(name)) for name in "ab")
    feeder.append(
        12, parts=[SourcePart(first, 5), SourcePart(None, 3), SourcePart(second, 4, more=True)]
    )
    assert memory.generation == 1
    assert places(memory) == [("a", 0, 5, True), ("b", 8, 12, False)]
    assert memory.source_at(6) is None
    feeder.append(3, parts=[SourcePart(second, 3)])
    assert places(memory) == [("a", 0, 5, True), ("b", 8, 15, True)]
    assert memory.verify().ok
    feeder.check()


@pytest.mark.parametrize(
    "parts",
    [
        [SourcePart(1, 5)],
        [SourcePart(1, 13)],
        [SourcePart(1, 12), SourcePart(None, 0)],
        [SourcePart(1, -1), SourcePart(None, 13)],
        [SourcePart(1, 6), SourcePart(1, 6)],
    ],
)
def test_parts_that_do_not_match_the_tokens_are_refused(make, parts):
    feeder = make()
    assert feeder.memory.begin_source(Source("a")) == 1
    with pytest.raises(InvariantError, match="parts of"):
        feeder.memory.append(**feeder.batch(12), parts=parts)
    assert (feeder.memory.n_tokens, feeder.memory.generation) == (0, 0)


def test_a_source_that_others_have_followed_cannot_go_on(make):
    feeder = make()
    source = feeder.memory.begin_source(Source("a"))
    feeder.append(5, parts=[SourcePart(source, 5, more=True)])
    with pytest.raises(InvariantError, match="begin a new source"):
        feeder.memory.append(**feeder.batch(5), parts=[SourcePart(None, 2), SourcePart(source, 3)])


def test_the_last_stretch_of_a_text_completes_the_earlier_ones(make):
    feeder = make()
    memory = feeder.memory
    text, other, unknown = Source("a", sha256="1"), Source("a", sha256="2"), Source("a")
    for source, more in ((text, True), (other, True), (unknown, True), (text, True)):
        feeder.append(5, parts=[SourcePart(memory.begin_source(source), 5, more)])
    assert [source.complete for source in memory.sources()] == [False] * 4
    feeder.append(5, source_id=memory.begin_source(unknown))
    assert [source.complete for source in memory.sources()] == [False] * 4 + [True]
    feeder.append(5, source_id=memory.begin_source(text))
    complete = [source.complete for source in memory.sources()]
    assert complete == [True, False, False, True, True, True]


def test_readers_and_other_openings_see_what_is_incomplete(make):
    feeder = make()
    path = feeder.memory.path
    source = feeder.memory.begin_source(Source("a"))
    feeder.append(5, parts=[SourcePart(source, 5, more=True)])
    with Memory.open(path) as reader:
        assert places(reader) == [("a", 0, 5, False)]
        feeder.append(4, source_id=source)
        assert places(reader) == [("a", 0, 5, False)]
        found = reader.source_at(4)
        assert found is not None
        assert not found.complete
        reader.refresh()
        assert places(reader) == [("a", 0, 9, True)]
    feeder.memory.close()
    with Memory.open(path) as again:
        assert places(again) == [("a", 0, 9, True)]


def test_incomplete_sources_are_restored_as_such(make):
    old, new = make("old.mctx"), make("new.mctx")
    source = old.memory.begin_source(Source("a"))
    old.append(9, parts=[SourcePart(source, 9, more=True)])
    new.append(9)
    new.memory.restore_sources(old.memory.sources())
    assert places(new.memory) == [("a", 0, 9, False)]
    new.append(3, source_id=source)
    assert places(new.memory) == [("a", 0, 12, True)]
    assert new.memory.verify().ok


@pytest.mark.parametrize("value", ["", "x", "{}", "[-1]", '["1"]', "[" * 100_000])
def test_a_damaged_list_of_incomplete_sources_is_told(make, value):
    feeder = make()
    source = feeder.memory.begin_source(Source("a"))
    feeder.append(5, parts=[SourcePart(source, 5, more=True)])
    connection = feeder.memory._catalog._connection
    (stored,) = connection.execute("SELECT value FROM meta WHERE key = ?", (UNFINISHED,)).fetchone()
    assert json.loads(stored) == [source]
    connection.execute("UPDATE meta SET value = ? WHERE key = ?", (value, UNFINISHED))
    with pytest.raises(CorruptMemoryError, match="incomplete source"):
        feeder.memory.sources()
    assert not feeder.memory.verify().ok
