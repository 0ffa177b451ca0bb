from __future__ import annotations

import json
import os

import pytest

from megacontext.errors import ConfigError, InputError
from megacontext.telemetry import FanOut, JsonlSink, MemorySink, Telemetry, read_events


def gists(telemetry: Telemetry, count: int) -> None:
    for index in range(count):
        telemetry.gist(generation=0, level=1, first=index, count=1, ms=0.5)


def test_jsonl_round_trip(tmp_path):
    path = tmp_path / "deep" / "events.jsonl"
    kept = MemorySink()
    with Telemetry(FanOut([JsonlSink(path), kept]), include_text=True) as telemetry:
        gists(telemetry, 3)
        telemetry.ingest(generation=1, start=0, tokens=2, ms=1.0, text='two\nlines "é" \u2028')
    assert list(read_events(path)) == kept.events
    assert len(path.read_bytes().splitlines()) == 4


def test_each_line_is_on_disk_before_the_next_event(tmp_path):
    path = tmp_path / "events.jsonl"
    telemetry = Telemetry(JsonlSink(path))
    for written in range(1, 4):
        gists(telemetry, 1)
        assert len(list(read_events(path))) == written
    telemetry.close()


def test_a_file_is_appended_to_and_absent_values_take_no_room(tmp_path):
    path = tmp_path / "events.jsonl"
    for _ in range(2):
        with Telemetry(JsonlSink(path)) as telemetry:
            telemetry.ingest(generation=0, start=0, tokens=2, ms=1.0)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    assert "text" not in lines[0]
    assert "source_id" not in lines[0]


def test_a_line_still_being_written_is_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    with Telemetry(JsonlSink(path)) as telemetry:
        gists(telemetry, 2)
    os.truncate(path, path.stat().st_size - 5)
    assert [event.sequence for event in read_events(path)] == [0]


def test_a_torn_line_does_not_swallow_the_next_event(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"kind":"gi')
    with Telemetry(JsonlSink(path)) as telemetry:
        gists(telemetry, 1)
    with pytest.raises(InputError, match="line 1"):
        list(read_events(path))
    assert json.loads(path.read_text().splitlines()[1])["kind"] == "gist"


def test_reading_says_what_is_wrong_and_where(tmp_path):
    with pytest.raises(InputError, match=r"absent\.jsonl"):
        list(read_events(tmp_path / "absent.jsonl"))
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match=r"binary\.jsonl"):
        list(read_events(binary))


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        JsonlSink(tmp_path)
    sink = JsonlSink(tmp_path / "events.jsonl")
    telemetry = Telemetry(sink)
    sink.close()
    sink.close()
    with pytest.raises(InputError, match="cannot be written"):
        gists(telemetry, 1)


def test_the_memory_sink_is_bounded():
    sink = MemorySink(limit=3)
    gists(Telemetry(sink), 5)
    assert [event.sequence for event in sink.events] == [2, 3, 4]
    with pytest.raises(ConfigError, match="limit is 0"):
        MemorySink(limit=0)
