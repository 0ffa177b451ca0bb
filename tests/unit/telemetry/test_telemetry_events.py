from __future__ import annotations

import json
from typing import get_args

import pytest
from pydantic import TypeAdapter, ValidationError

from megacontext.errors import InputError
from megacontext.telemetry import Event, IngestEvent, ScoreEvent, Span, event_json_schema
from megacontext.telemetry.events import parse_event

KINDS = {"ingest", "gist", "score", "edit", "refocus", "decode", "commit"}
SCORE = {
    "kind": "score",
    "sequence": 3,
    "time": 1.5,
    "generation": 2,
    "policy": "lexical",
    "entries": 4,
    "spans": [[1, 0, 32], [0, 32, 64]],
    "scores": [0.25, -0.5],
    "ms": 0.75,
}


def test_a_line_of_json_becomes_the_event_of_its_kind():
    event = parse_event(json.dumps(SCORE), "here")
    assert event == ScoreEvent(
        sequence=3,
        time=1.5,
        generation=2,
        policy="lexical",
        entries=4,
        spans=(Span(1, 0, 32), Span(0, 32, 64)),
        scores=(0.25, -0.5),
        ms=0.75,
    )
    assert isinstance(event.spans[0], Span)
    assert json.loads(event.model_dump_json()) == SCORE


def test_events_are_frozen():
    event = parse_event(json.dumps(SCORE), "here")
    with pytest.raises(ValidationError):
        event.generation = 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "dream"}, "dream"),
        ({"scores": [0.25]}, "2 spans but 1 scores"),
        ({"sequence": -1}, "sequence"),
        ({"ms": -0.5}, "ms"),
        ({"entries": "many"}, "entries"),
        ({"spans": [[1, 0], [0, 32, 64]]}, "spans"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_what_the_schema_does_not_allow_is_refused(change, said):
    with pytest.raises(InputError, match=said) as caught:
        parse_event(json.dumps(SCORE | change), "log, line 7")
    assert str(caught.value).startswith("log, line 7: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_are_finite(value):
    with pytest.raises(ValidationError):
        ScoreEvent(
            sequence=0,
            time=0,
            generation=0,
            policy="lens",
            entries=1,
            ms=0,
            spans=(Span(0, 0, 1),),
            scores=(value,),
        )


def test_the_schema_lists_every_kind_and_types_its_fields():
    schema = event_json_schema()
    assert set(schema["discriminator"]["mapping"]) == KINDS
    assert {model.model_fields["kind"].default for model in get_args(get_args(Event)[0])} == KINDS
    score = schema["$defs"]["ScoreEvent"]
    assert score["additionalProperties"] is False
    assert {"sequence", "time", "generation", "policy", "entries", "ms"} <= set(score["required"])
    span = schema["$defs"]["Span"]
    assert [item["type"] for item in span["prefixItems"]] == ["integer"] * 3
    json.dumps(schema)


def test_text_is_optional_and_absent_by_default():
    event = IngestEvent(sequence=0, time=0, generation=0, start=0, tokens=3, ms=1)
    assert event.text is None
    assert TypeAdapter(Event).validate_json(event.model_dump_json()) == event
