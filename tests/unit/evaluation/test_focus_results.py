from __future__ import annotations

import pytest

from megacontext.evaluation.focus_asking import Answered
from megacontext.evaluation.focus_results import (
    Cell,
    answer_results,
    cost_results,
    length_name,
    stream_results,
)
from megacontext.evaluation.focus_streams import Streamed

SHORT, LONG = 4_000, 1_000_000


def answers(*right, raw=1.0, abstained=False):
    return [Answered("", bool(one), abstained, raw / 2, raw, 0.1, 5.0) for one in right]


@pytest.fixture(scope="module")
def found():
    cells = {
        Cell("same_words", SHORT, "lexical"): answers(1, 1, 1, 0),
        Cell("same_words", SHORT, "lens"): answers(1, 1, 1, 1),
        Cell("two_hop", SHORT, "lexical"): answers(0, 0, 0, 1, raw=0.5),
        Cell("two_hop", SHORT, "lens"): answers(1, 1, 0, 0, raw=0.8),
        Cell("none", SHORT, "lens"): answers(1, 1, abstained=True),
        Cell("same_words", LONG, "lexical"): answers(1, 0, 0, 0),
        Cell("same_words", LONG, "lens"): answers(1, 1, 1, 0),
        Cell("two_hop", LONG, "lens"): answers(1, 0, 0, 0),
        Cell("two_hop", LONG, "lexical"): answers(0, 0, 0, 0),
        Cell("none", LONG, "lens"): [*answers(1, abstained=True), *answers(0)],
    }
    return answer_results(
        cells, {"same_words": answers(1, 1, 0, 0), "two_hop": answers(0, 0, 0, 0)}
    )


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(4_000, "4k"), (1_000_000, "1m"), (256_000, "256k"), (1_500_000, "1500k"), (4_096, "4096")],
)
def test_lengths_have_short_names(tokens, name):
    assert length_name(tokens) == name


def test_every_cell_has_its_measures(found):
    assert found["accuracy.same_words.4k.lexical"].value == 0.75
    assert found["accuracy.same_words.in_window"].value == 0.5
    assert found["relative_accuracy.same_words.1m.lens"].value == 1.5
    assert found["swap_rate.two_hop.4k.lens"].value == pytest.approx(0.1)
    assert found["refocus_ms.two_hop.4k.lens"].value == pytest.approx(5.0)
    assert found["false_answers.none.1m.lens"].value == 0.5
    assert {estimate.n for name, estimate in found.items() if "same_words" in name} == {4}


def test_evidence_of_several_looks_counts_at_the_last_one(found):
    assert found["evidence_at_start.two_hop.4k.lens"].value == pytest.approx(0.4)
    assert found["evidence_at_L0.two_hop.4k.lens"].value == pytest.approx(0.8)
    assert found["evidence_at_L0.same_words.4k.lens"].value == pytest.approx(0.5)


def test_a_kind_that_is_never_right_in_the_window_has_no_relative_accuracy(found):
    assert not any(name.startswith("relative_accuracy.two_hop") for name in found)


def test_the_lens_stands_under_the_published_names(found):
    for name in ("evidence_at_L0.same_words.1m", "relative_accuracy.same_words.1m"):
        assert found[name] == found[f"{name}.lens"]
    assert found["lens_minus_lexical.two_hop.4k"].value == pytest.approx(25.0)
    assert found["lens_minus_lexical.same_words.1m"].value == pytest.approx(50.0)
    assert found["length_retention.1m_over_4k"].value == pytest.approx(0.75)
    assert found["length_retention.1m_over_4k.lexical"].value == pytest.approx(1 / 3)
    assert found["false_answers.no_evidence"].value == 0.25
    assert found["false_answers.no_evidence"].n == 4


def test_without_the_lens_none_of_its_names_is_there():
    cells = {Cell("same_words", SHORT, "lexical"): answers(1, 0)}
    names = set(answer_results(cells, {}))
    assert names == {
        f"{measure}.same_words.4k.lexical"
        for measure in
        ("accuracy", "evidence_at_start", "evidence_at_L0", "swap_rate", "refocus_ms")
    }  # fmt: skip


def test_regret_is_against_the_oracle_block_by_block():
    streams = {
        "lens": Streamed([3.0, 2.0], [0.1, 0.0], [0.05, 0.0]),
        "oracle": Streamed([2.5, 2.0], [1.0, 1.0], [1.0, 1.0]),
    }
    found = stream_results(streams)
    assert found["regret.prose"].value == pytest.approx(0.25)
    assert found["regret.prose"] == found["regret.prose.lens"]
    assert found["swap_rate.prose_calm"].value == pytest.approx(0.05)
    assert found["chosen_swap_rate.prose_calm"].value == pytest.approx(0.025)
    assert "swap_rate.prose_calm.oracle" not in found
    assert "regret.prose" not in stream_results({"lens": streams["lens"]})


def test_the_cost_of_a_refocus_is_counted_in_decode_steps():
    found = cost_results({"lens": ([4.0, 6.0], [2.0, 3.0]), "recency": ([1.0], [2.0])})
    assert found["refocus_cost_ratio"].value == pytest.approx(2.0)
    assert found["refocus_cost_ratio.recency"].value == pytest.approx(0.5)
