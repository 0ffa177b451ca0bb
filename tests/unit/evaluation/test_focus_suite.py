from __future__ import annotations

import pytest
from focus_cases import lexical_lens, write_babi

from megacontext.errors import CheckpointError, ConfigError
from megacontext.evaluation import focus_asking
from megacontext.evaluation.focus_config import FocusSuiteConfig
from megacontext.evaluation.focus_suite import run_focus_suite

ONE_LOOK = ("same_words", "corrected")
SMALL = {
    "lengths": (4_000,), "groups": 1, "asked": 2, "prose_streams": 0, "cost_samples": 0,
    "babi": None, "lens": "none", "gistnet": "mean", "max_new_tokens": 24,
}  # fmt: skip


def run(note=None, **settings):
    return run_focus_suite(FocusSuiteConfig(**{**SMALL, **settings}), note=note)


@pytest.fixture(scope="module")
def rivals():
    return run(kinds=ONE_LOOK, policies=("recency", "lexical", "oracle"))


def test_who_searches_finds_what_who_does_not_search_misses(rivals):
    for policy in ("lexical", "oracle"):
        for kind in ONE_LOOK:
            found = rivals[f"evidence_at_L0.{kind}.4k.{policy}"].value
            assert found > rivals[f"evidence_at_L0.{kind}.4k.recency"].value
    right = {
        policy: sum(rivals[f"accuracy.{kind}.4k.{policy}"].value for kind in ONE_LOOK)
        for policy in ("recency", "lexical", "oracle")
    }
    assert right["recency"] < min(right["lexical"], right["oracle"])


def test_every_cell_tells_how_many_questions_it_asked(rivals):
    cells = [estimate for name, estimate in rivals.items() if name.count(".") == 3]
    assert len(cells) == 6 * 6
    assert {estimate.n for estimate in cells} == {2}


def test_an_interrupted_run_asks_nothing_twice(tmp_path, monkeypatch):
    settings = {
        "kinds": ("codes",), "policies": ("recency", "lexical"), "work": tmp_path,
        "cost_samples": 2, "prose_streams": 1, "prose_history": 1100, "prose_blocks": 2,
    }  # fmt: skip
    asked = []
    ask = focus_asking.Asker.ask

    def watched(self, question, policy):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((question.kind, question.number, policy.name))
        return ask(self, question, policy)

    monkeypatch.setattr(focus_asking.Asker, "ask", watched)
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    monkeypatch.setattr(focus_asking.Asker, "ask", ask)
    said = []
    config = FocusSuiteConfig(**{**SMALL, **settings})
    first = run_focus_suite(config, said.append)
    assert sum("question" in line for line in said) == 4 - 3
    said.clear()
    assert run_focus_suite(config, said.append) == first
    assert not said
    assert {"swap_rate.prose_calm.lexical", "refocus_cost_ratio.lexical"} <= set(first)
    update = {"seed": 1, "policies": ("recency",), "cost_samples": 0, "prose_streams": 0}
    run_focus_suite(config.model_copy(update=update), said.append)
    assert sum("question" in line for line in said) == 2


def test_the_lens_is_compared_under_its_published_names(tmp_path):
    lens = lexical_lens(tmp_path / "lens", 192)
    babi = write_babi(tmp_path / "babi")
    notes = []
    found = run(
        notes.append, lens=lens, babi=babi, kinds=("same_words", "babi_qa2"), asked=1,
        policies=("lexical", "lens"),
    )  # fmt: skip
    assert not notes
    assert found["evidence_at_L0.same_words.4k"].value == 1.0
    assert "lens_minus_lexical.babi_qa2.4k" in found
    assert found["accuracy.babi_qa2.4k.lens"].n == 1


def test_what_cannot_be_compared_is_left_out_with_a_note(tmp_path):
    notes = []
    found = run(
        notes.append, policies=("recency", "lens"), kinds=("none", "babi_qa3"),
        babi=tmp_path / "missing",
    )  # fmt: skip
    assert any("lens is left out" in note for note in notes)
    assert any("babi_qa3" in note and "missing" in note for note in notes)
    assert set(found) == {
        f"{measure}.none.4k.recency"
        for measure in ("accuracy", "false_answers", "swap_rate", "refocus_ms")
    }


def test_a_run_that_compares_nothing_is_refused():
    with pytest.raises(ConfigError, match="no LensNet"):
        run(policies=("lens",))


def test_a_lens_for_another_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="LensNet"):
        run(lens=lexical_lens(tmp_path / "lens", 64), policies=("lens",))
