from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.evaluation.focus_asking import Answered, TellingOracle
from megacontext.evaluation.focus_histories import FocusQuestion
from megacontext.runtime.oracle_policy import OraclePolicy
from megacontext.tasks.documents import Question

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
