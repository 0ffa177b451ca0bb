"""A recorded session comes again; what differs, and what is damaged in the file, is named."""

from __future__ import annotations

import json
import shutil
import stat
from itertools import islice

import pytest
from engine_cases import config, words
from tiny_models import save_tiny_model

from megacontext.errors import (
    CheckpointError,
    ConfigError,
    InputError,
    InvariantError,
    MemoryExistsError,
    ModelError,
)
from megacontext.gistnet import GistNet
from megacontext.memory import Source
from megacontext.runtime.recording import SessionRecording
from megacontext.runtime.recording_format import GenerateCall, read_calls, read_header
from megacontext.runtime.replay import ReplayReport, first_difference, replay
from megacontext.runtime.session import Session, SessionConfig

SAMPLED = {"do_sample": True, "temperature": 1.5, "top_k": 40, "seed": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_tiny_model(tmp_path_factory.mktemp("model"), max_positions=256))


def new_session(model, **changes) -> Session:
    return Session(SessionConfig.parse({"model": model, "engine": config(), **changes}))


@pytest.fixture(scope="module")
def recorded(model, tmp_path_factory):
    """Every kind of call: as a whole, left early, and refused."""
    folder = tmp_path_factory.mktemp("recorded")
    path = folder / "session.jsonl"
    with (
        new_session(model, telemetry=folder / "events.jsonl") as session,
        SessionRecording(session, folder / "a.mctx", path) as recording,
    ):
        text = [words(150) + "zebra quagga ", words(450, seed=1)]
        recording.ingest(text, Source("notes", tags=("a", "b")))
        assert len(list(recording.stream(words(64, seed=2)))) == 2
        assert len(list(islice(recording.stream(words(96, seed=3)), 2))) == 2
        recording.refocus("lotus north", reserve=8)
        recording.ask("amber and ", max_new_tokens=6, query="zebra quagga", look_again=" ")
        said = "".join(
            token.text for token in recording.generate("iris \ud800 ", max_new_tokens=8, **SAMPLED)
        )
        answer = recording.generate("jade", max_new_tokens=40, **SAMPLED)
        assert len(list(islice(answer, 5))) == 5
        answer.close()
        with pytest.raises(InputError, match="do not fit"):
            recording.ask(words(180))
    return path, said


@pytest.fixture
def lines(recorded):
    return recorded[0].read_text().splitlines(keepends=True)


def edited(tmp_path, lines, number, change):
    """The recording with one line (counted from one) changed."""
    values = json.loads(lines[number - 1])
    change(values)
    path = tmp_path / "edited.jsonl"
    changed = [*lines[: number - 1], json.dumps(values) + "\n", *lines[number:]]
    path.write_text("".join(changed))
    return path


def test_a_recorded_session_comes_again(recorded, tmp_path):
    path, _ = recorded
    events = path.with_name("events.jsonl")
    size = events.stat().st_size
    report = replay(path, tmp_path)
    assert events.stat().st_size == size, "a replay writes no telemetry"
    outcomes = [outcome for _, _, outcome in read_calls(path)]
    assert report == ReplayReport(
        calls=8,
        refocuses=sum(len(outcome.refocuses) for outcome in outcomes),
        tokens=sum(len(outcome.tokens) for outcome in outcomes),
    )
    assert report.refocuses > 6
    with pytest.raises(MemoryExistsError):
        replay(path, tmp_path)


def test_what_is_written_down(recorded):
    path, said = recorded
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    calls = list(read_calls(path))
    assert [call.name for _, call, _ in calls] == [
        *("ingest", "stream", "stream", "refocus", "ask", "generate", "generate", "ask")
    ]
    assert [number for number, _, _ in calls] == list(range(3, 18, 2))
    generated, outcome = calls[5][1:]
    assert isinstance(generated, GenerateCall)
    assert generated.seed == 7
    assert outcome.text == said
    assert len(outcome.tokens) == outcome.taken > 0
    assert [out.ended for _, _, out in calls] == [
        *(True, True, False, True, True, True, False, False)
    ]
    assert [out.error for _, _, out in calls] == [None] * 7 + ["InputError"]
    rounds = [refocus.round for _, _, out in calls for refocus in out.refocuses]
    assert rounds == list(range(1, len(rounds) + 1)), "every refocus, once"
    assert any(refocus.edits for refocus in calls[4][2].refocuses)
    models = read_header(path).models
    assert models["gist_version"] == GistNet.untrained(32).version
    assert models["lens_version"] == "none"


def change_token(values):
    values["tokens"][3] += 1


def change_score(values):
    edits = next(r["edits"] for r in values["refocuses"] if r["edits"])
    edits[0]["score"] += 1e-6


def change_span(values):
    values["refocuses"][0]["spans"].pop()


def change_error(values):
    values["error"] = None


@pytest.mark.parametrize(
    ("number", "change", "complaint"),
    [
        (13, change_token, r"line 13, call 5 \(generate\): tokens\[3\] is \d+, recorded is \d+"),
        (11, change_score, r"line 11, call 4 \(ask\): refocuses\[\d\].edits\[0\].score is "),
        (5, change_span, r"line 5, call 1 \(stream\): refocuses\[0\].spans\[\d+\] is \["),
        (17, change_error, r"line 17, call 7 \(ask\): error is 'InputError', recorded is None"),
    ],
)
def test_a_difference_is_named(tmp_path, lines, number, change, complaint):
    path = edited(tmp_path, lines, number, change)
    with pytest.raises(InvariantError, match=complaint) as error:
        replay(path, tmp_path)
    assert "\n" not in str(error.value)


def change_budget(values):
    values["config"]["engine"]["budget"] = 160


def change_prompt(values):
    values["prompt"] += "!"


def drop_seed(values):
    values["seed"] = "seven"


def add_key(values):
    values["more"] = 1


@pytest.mark.parametrize(
    ("number", "change", "complaint"),
    [
        (1, change_budget, "line 1 is damaged .*configuration or a model"),
        (12, change_prompt, "line 12 is damaged .*an argument of the call"),
        (12, drop_seed, r"line 12 is damaged \(generate.seed: "),
        (13, add_key, r"line 13 is damaged \(more: "),
        (1, lambda values: values.update(version=2), "format version 2, this program reads 1"),
        (1, lambda values: values.update(format="else"), "no recording of a session"),
        (18, lambda values: values.update(calls=9), "line 18 is damaged .*ends after 9 calls"),
    ],
)
def test_a_changed_line_that_a_replay_would_act_on_is_refused(
    tmp_path, lines, number, change, complaint
):
    path = edited(tmp_path, lines, number, change)
    with pytest.raises(InputError, match=complaint):
        replay(path, tmp_path / "memory")
    assert not (tmp_path / "memory").exists(), "nothing was run"


def damaged_texts(lines):
    whole = "".join(lines)
    return {
        "no recording": ["", "{}\n"],
        "is damaged": [
            "\n",
            "[1]\n",
            whole[: len(lines[0]) + 30],
            whole[:-1],
            whole + lines[-1],
            whole.replace(lines[2], ""),
            whole.replace(lines[2], lines[2] * 2),
            whole.replace(lines[3], "[" * 100_000 + "\n"),
        ],
        "without its last line": ["".join(lines[:n]) for n in range(1, len(lines))],
    }


@pytest.mark.parametrize("complaint", ["no recording", "is damaged", "without its last line"])
def test_a_damaged_or_truncated_file_is_one_clear_error(tmp_path, lines, complaint):
    path = tmp_path / "damaged.jsonl"
    for text in damaged_texts(lines)[complaint]:
        path.write_text(text)
        with pytest.raises(InputError, match=complaint) as error:
            replay(path, tmp_path / "memory")
        assert "\n" not in str(error.value)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="line 1 is damaged"):
        replay(path, tmp_path / "memory")
    with pytest.raises(InputError, match="cannot be read"):
        replay(tmp_path / "none.jsonl", tmp_path / "memory")


def test_other_models_are_refused_before_anything_is_run(tmp_path):
    folder = save_tiny_model(tmp_path / "model", max_positions=256)
    gists = tmp_path / "gists"
    GistNet.untrained(32).save_pretrained(gists)
    path = tmp_path / "session.jsonl"
    with (
        new_session(str(folder), gistnet=str(gists)) as session,
        SessionRecording(session, tmp_path / "a.mctx", path) as recording,
    ):
        recording.ingest(words(100))
    shutil.rmtree(folder)
    save_tiny_model(folder, seed=1, max_positions=256)
    with pytest.raises(ModelError, match=r"base_weights is '\w{16}', recorded is '\w{16}'"):
        replay(path, tmp_path / "memory")
    shutil.rmtree(gists)
    with pytest.raises(CheckpointError):
        replay(path, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_a_file_that_is_there_is_kept(model, tmp_path):
    path = tmp_path / "session.jsonl"
    path.write_text("mine")
    with new_session(model) as session:
        with pytest.raises(InputError, match="is there already"):
            SessionRecording(session, tmp_path / "a.mctx", path)
        with pytest.raises(InputError, match="cannot be written"):
            SessionRecording(session, tmp_path / "a.mctx", tmp_path / "none" / "b.jsonl")
    assert path.read_text() == "mine"
    assert not (tmp_path / "a.mctx").exists()


def test_a_memory_that_cannot_be_made_leaves_no_file(model, tmp_path):
    path = tmp_path / "session.jsonl"
    too_large = new_session(model, engine=config(budget=1024))
    with pytest.raises(ConfigError, match="budget"):
        SessionRecording(too_large, tmp_path / "a.mctx", path)
    assert not path.exists()


def test_one_call_at_a_time_and_none_behind_the_end(model, tmp_path):
    with new_session(model) as session:
        recording = SessionRecording(session, tmp_path / "a.mctx", tmp_path / "session.jsonl")
        answer = recording.generate("amber", max_new_tokens=3)
        next(answer)
        with pytest.raises(InputError, match="has not ended"):
            recording.ingest("birch")
        answer.close()
        with pytest.raises(InputError, match=r"generate cannot be recorded: generate\.query"):
            list(recording.generate("amber", query=3))
        recording.close()
        recording.close()
        with pytest.raises(InputError, match="has ended"):
            recording.ingest("birch")
    assert replay(recording.path, tmp_path / "again").tokens == 1


def test_a_session_cut_off_within_a_call_is_not_whole(model, tmp_path):
    """As by Ctrl-C: what would have come of the call is not known."""

    def interrupt():
        yield "amber "
        raise KeyboardInterrupt

    path = tmp_path / "session.jsonl"
    with new_session(model) as session:
        recording = SessionRecording(session, tmp_path / "a.mctx", path)
        with pytest.raises(KeyboardInterrupt):
            recording.ingest(interrupt())
        recording.ingest("birch ")
        answer = recording.generate("amber", max_new_tokens=3)
        next(answer)
        with pytest.raises(KeyboardInterrupt):
            answer.throw(KeyboardInterrupt)
        recording.close()
    with pytest.raises(InputError, match="after line 4 without its last line"):
        replay(path, tmp_path / "again")


@pytest.mark.parametrize(
    ("recorded", "now", "told"),
    [
        ({"a": [1, float("nan")]}, {"a": [1, float("nan")]}, None),
        ({"a": [1, 2.5]}, {"a": [1, 2.25]}, "a[1] is 2.25, recorded is 2.5"),
        ({"a": [1, 2]}, {"a": [1]}, "a[1] is 'nothing', recorded is 2"),
        ({"a": {"b": "x"}}, {"a": {"b": "y"}}, "a.b is 'y', recorded is 'x'"),
        ({"a": "x" * 99}, {"a": ""}, f"a is '', recorded is '{'x' * 59}…"),
    ],
)
def test_the_first_difference(recorded, now, told):
    assert first_difference(recorded, now) == told
