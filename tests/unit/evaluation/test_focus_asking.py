from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from engine_cases import K, config, new_engine, words
from tiny_models import tiny_base_model

from megacontext.evaluation import focus_asking
from megacontext.evaluation.focus_asking import Answered, Asker, RefocusTimes, TellingOracle
from megacontext.evaluation.focus_histories import FocusQuestion
from megacontext.runtime.focus_policies import RecencyPolicy, proposals_to_scores
from megacontext.runtime.oracle_policy import OraclePolicy
from megacontext.tasks.documents import Question
from megacontext.telemetry import Telemetry

NOTED = Question(
    "Where is it?", "attic", 2, "qa2", notes="Ann has it. Ann is in the attic.", evidence=(0, 1)
)


@pytest.mark.parametrize(
    ("written", "right", "abstained"),
    [
        (" attic", True, False),
        (" Ann has it. Ann is in the attic. So: attic", True, False),
        (" attic. So: cellar", False, False),
        (" unknown", False, True),
        (" Unknown.", False, True),
        (" I don't know", False, True),
        (" not mentioned in the text", False, True),
        ("", False, True),
        (" unknowns", False, False),
    ],
)
def test_answers_are_marked_by_what_comes_last(written, right, abstained):
    answered = Answered.of(written, "attic")
    assert (answered.right, answered.abstained) == (right, abstained)
    assert Answered(**answered.as_json()) == answered


@pytest.mark.parametrize(
    ("written", "left"),
    [
        ("", " Ann has it. Ann is in the attic. So: attic\n"),
        (" Ann ha", " Ann has it. Ann is in the attic. So: attic\n"),
        (" Bob had it.", " Ann is in the attic. So: attic\n"),
        (" Ann has it. Ann is in the attic.", " So: attic\n"),
        (" One. Two. Three. Four.", " So: attic\n"),
    ],
)
def test_the_oracle_is_told_what_is_left_to_write(written, left, monkeypatch):
    base = tiny_base_model()
    question = FocusQuestion("two_hop", 0, NOTED, ("a", "b"), ((31, 33), (70, 96)))
    prompt = base.encode(question.prompt)
    oracle = TellingOracle(question, base, len(prompt), 32)
    told = {}

    def score(self, view):
        told["future"], told["hints"] = base.decode(self.future), self.hints

    monkeypatch.setattr(OraclePolicy, "score", score)
    oracle.score(SimpleNamespace(pending=torch.cat((prompt, base.encode(written)))))
    assert told == {"future": left, "hints": (0, 1, 2)}


class _Opening:
    """Asks for one block from its second look on, and for the next one from the third on."""

    name = "opening"

    def __init__(self, *blocks):
        self.blocks = blocks
        self.looks = 0

    def score(self, view):
        self.looks += 1
        found = torch.tensor(self.blocks[: max(0, self.looks - 1)], dtype=torch.int64)
        return proposals_to_scores(view.context, found, torch.full((len(found),), 5.0))


@pytest.mark.parametrize("kv", ["exact", "incremental"])
def test_evidence_counts_where_it_is_raw_at_the_start_and_at_the_end(kv, tmp_path, monkeypatch):
    base = tiny_base_model(max_positions=256)
    times = RefocusTimes()
    engine = new_engine(
        tmp_path,
        base,
        config=config(kv=kv, refocus_rounds=1, budget=256),
        telemetry=Telemetry(times),
    )
    engine.ingest(words(20 * K))
    asker = Asker(engine, times, 2 * K)
    question = FocusQuestion(
        "two_hop", 0, NOTED, ("a", "b"), ((3 * K, 3 * K + 2), (7 * K, 7 * K + 2))
    )
    never = asker.ask(question, RecencyPolicy())
    assert (never.raw_at_start, never.raw_at_end) == (0.0, 0.0)
    # The first look finds nothing, the next one, behind a note, a block, and the third another one.
    said = asker.ask(question, _Opening(3, 7)).answer
    monkeypatch.setattr(focus_asking, "_LOOK_AGAIN", said[3])
    later = asker.ask(question, _Opening(3))
    assert (later.raw_at_start, later.raw_at_end) == (0.0, 0.5)
    both = _Opening(3, 7)
    both.looks = 2
    at_once = asker.ask(question, both)
    assert at_once.raw_at_start == 1.0
    assert at_once.refocus_ms > 0
