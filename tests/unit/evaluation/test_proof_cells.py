from __future__ import annotations

import pytest
from tiny_models import tiny_base_model

from megacontext.evaluation.noise import NoiseTokens
from megacontext.evaluation.proof_cells import Cell, by_history
from megacontext.evaluation.proof_config import ProofSuiteConfig

NOISE = NoiseTokens(tiny_base_model(), [" ".join(f"Noise number {i}." for i in range(300))])


def histories(cell, **settings):
    config = ProofSuiteConfig.parse({"facts": 6, "asked": 3, **settings})
    return list(by_history(cell.ask(NOISE, config)))


def test_questions_about_one_history_stay_together():
    groups = histories(Cell("recall", "planted", "2k", 7))
    assert [len(group) for group in groups] == [3, 3, 1]
    for group in groups:
        assert all(question.history is group[0].history for question in group)
        assert len({question.question for question in group}) == len(group)


def test_few_facts_are_corrected():
    assert [len(group) for group in histories(Cell("recall", "corrections", "2k", 3))] == [1] * 3


def test_more_questions_begin_with_the_same():
    few, many = (histories(Cell("recall", "key_value", "2k", count)) for count in (2, 8))
    assert [question.question for question in few[0]] == [q.question for q in many[0]][:2]
    assert few[0][0].history.equal(many[0][0].history)


@pytest.mark.parametrize("depth", [0.0, 1.0])
def test_the_needle_of_the_heat_map_stands_where_it_says(depth):
    for [question] in histories(Cell("niah_depth", "niah_single", "2k", 2, depth)):
        [(start, end)] = question.evidence
        assert (start < 50) if depth == 0 else (end > 1950)


def test_settings_change_with_what_they_are_for():
    plain = ProofSuiteConfig.parse({"wording": "plain"})
    seeded, facts = (ProofSuiteConfig.parse({name: 9}) for name in ("seed", "facts"))
    ruler, recall = Cell("ruler", "vt", "2k", 1), Cell("recall", "planted", "2k", 1)
    usual = ProofSuiteConfig()
    for cell, changed, unchanged in ((ruler, plain, facts), (recall, facts, plain)):
        assert cell.settings(changed) != cell.settings(usual)
        assert cell.settings(unchanged) == cell.settings(usual)
        assert cell.settings(seeded) != cell.settings(usual)
