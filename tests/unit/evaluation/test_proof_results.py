from __future__ import annotations

import pytest

from megacontext.evaluation.proof_cells import Cell
from megacontext.evaluation.proof_config import ProofSuiteConfig
from megacontext.evaluation.proof_records import Record
from megacontext.evaluation.proof_results import Measured, estimates, facts


def answers(scores, history=1, **measured):
    """Records of one rival in one cell, ``history`` questions a history."""
    return [
        Record(
            setup="s",
            cell="c",
            rival="r",
            number=number,
            seed=0,
            commit="x",
            history=number // history,
            tokens=4000,
            ingest_s=2.0,
            score=score,
            **measured,
        )
        for number, score in enumerate(scores)
    ]


def refusal(reason):
    return [Record(setup="s", cell="c", rival="r", number=0, seed=0, commit="x", refused=reason)]


def measure(cells, stream=None, /, **settings):
    known = {"lengths": "4k", "far_lengths": "", "seed": 0}
    config = ProofSuiteConfig.parse(known | settings)
    return Measured(config=config, cells=cells, prose=stream or {})


def test_shares_and_means_are_named_by_cell_and_rival():
    cells = {
        Cell("ruler", "vt", "4k", 4): {
            "megacontext": answers([1, 1, 1, 0]),
            "window": answers([0.25, 0.75, 0, 0]),
        }
    }
    found = estimates(measure(cells))
    ours, window = found["ruler.vt.4k"], found["ruler.vt.4k.window"]
    assert (ours.value, ours.n) == (0.75, 4)
    assert ours.low == pytest.approx(0.3006, abs=1e-3)
    assert (window.value, window.n) == (0.25, 4)
    assert window.low >= 0


def test_the_mean_of_five_tasks_needs_all_five():
    scores = {f"qa{number}": [1] * number + [0] * (5 - number) for number in range(1, 6)}
    cells = {
        Cell("babilong", task, "4k", 5): {"megacontext": answers(right)}
        for task, right in scores.items()
    }
    found = estimates(measure(cells))
    assert found["babilong.qa1-5.4k"].value == pytest.approx(0.6)
    assert found["babilong.qa1-5.4k"].n == 25
    del cells[Cell("babilong", "qa3", "4k", 5)]
    assert "babilong.qa1-5.4k" not in estimates(measure(cells))


def leads(by_rival, length="128k", tasks=("planted", "synonyms")):
    cells = {
        Cell("recall", task, length, 4): {
            rival: answers(scores[index], history=2) for rival, scores in by_rival.items()
        }
        for index, task in enumerate(tasks)
    }
    return estimates(measure(cells, recall=tasks))


def test_the_lead_is_over_the_rival_that_comes_closest():
    found = leads(
        {
            "megacontext": ([1, 1, 1, 1], [1, 1, 0, 0]),
            "megacontext.lexical": ([1, 1, 1, 1], [1, 1, 1, 1]),
            "window": ([0, 0, 0, 0], [0, 0, 0, 0]),
            "bm25": ([1, 1, 0, 0], [0, 1, 0, 0]),
            "oracle": ([1, 1, 1, 1], [1, 1, 1, 1]),
            "full": ([1, 1, 1, 1], [1, 1, 1, 1]),
        }
    )
    assert found["lead.recall.128k"].value == pytest.approx(100 * (0.5 + 0.25) / 2)
    assert found["lead.recall.128k"] == found["lead.recall.128k.bm25"]
    assert found["lead.recall.128k.window"].value == pytest.approx(75.0)
    assert found["lead.recall.128k"].n == 8
    names = {name for name in found if name.startswith("lead.")}
    assert names == {f"lead.recall.128k{rival}" for rival in ("", ".window", ".bm25")}


def test_the_lead_draws_the_questions_of_a_history_together():
    found = leads({"megacontext": ([1, 1, 0, 0],), "window": ([0] * 4,)}, tasks=("planted",))
    lead = found["lead.recall.128k"]
    assert (lead.value, lead.low, lead.high) == (50.0, 0.0, 100.0)


def test_the_lead_pairs_the_questions_that_both_were_asked():
    found = leads({"megacontext": ([0, 1, 1, 1],), "bm25": ([0, 1],)}, tasks=("planted",))
    assert found["lead.recall.128k"].value == 0.0
    assert found["lead.recall.128k"].n == 2


def test_the_lead_may_be_a_loss():
    found = leads({"megacontext": ([0] * 4,), "bm25": ([1] * 4,)}, tasks=("planted",))
    assert found["lead.recall.128k"].value == -100.0


def test_without_128k_the_longest_length_leads():
    scores = {"megacontext": ([1] * 4, [1] * 4), "window": ([0] * 4, [0] * 4)}
    assert "lead.recall.16k" in leads(scores, length="16k")


def test_who_refuses_has_no_result_but_a_reason():
    cells = {
        Cell("ruler", "vt", "4k", 2): {
            "megacontext": answers([1, 1]),
            "full": refusal("too long"),
        }
    }
    measured = measure(cells, {"full": refusal("too long")}, prose="8k")
    assert not [name for name in estimates(measured) if name.endswith("full")]
    told = facts(measured)
    assert told["refused"] == {"full": {"ruler.vt.4k": "too long", "prose.8k": "too long"}}
    assert told["scores"] == {"ruler.vt.4k": {"megacontext": [1.0, 1.0]}}
    assert told["lengths"] == ["4k"]


def test_the_gain_in_prose_is_paired():
    def blocks(values):
        return [
            Record(
                setup="s",
                cell="c",
                rival="r",
                number=number,
                seed=0,
                commit="x",
                ingest_s=1.0,
                position=32 * number,
                nll=nll,
            )
            for number, nll in enumerate(values)
        ]

    stream = {
        "window": blocks([3.0, 9.0, 4.0]),
        "megacontext": blocks([2.9, 8.9, 3.9]),
        "bm25": blocks([3.1, 9.1, 4.1]),
    }
    measured = measure({}, stream, prose="100k")
    found = estimates(measured)
    gain = found["prose_nll_gain.100k"]
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found["prose_nll_gain.100k.bm25"].value == pytest.approx(-0.1)
    assert found["prose_nll.100k.window"].value == pytest.approx(16 / 3)
    assert "prose_nll_gain.100k.window" not in found
    told = facts(measured)["prose"]
    assert told["bm25"] == {"positions": [0, 32, 64], "nll": [3.1, 9.1, 4.1]}


def test_evidence_speed_and_habits():
    ours = answers([1, 0], evidence=0.5, seconds=2.0, swap_rate=0.1, peak_rss_mb=300.0)
    theirs = answers([1, 0], evidence=0.0, seconds=4.0, index_s=7.0, peak_rss_mb=500.0)
    cells = {
        Cell("ruler", "vt", "4k", 2): {"megacontext": ours, "own_keys": theirs},
        Cell("ruler", "cwe", "4k", 2): {"megacontext": ours},
        Cell("niah_depth", "niah_single", "4k", 2, 0.25): {"megacontext": answers([1, 1])},
    }
    found = estimates(measure(cells))
    assert found["evidence_at_L0.vt.4k"].value == 0.5
    assert found["evidence_at_L0.vt.4k.own_keys"].value == 0.0
    assert "evidence_at_L0.cwe.4k" not in found
    assert (found["seconds_per_answer.4k"].value, found["seconds_per_answer.4k"].n) == (2.0, 4)
    assert found["seconds_to_index.4k.own_keys"].value == 7.0
    assert "seconds_to_index.4k" not in found
    assert found["swap_rate.4k"].value == pytest.approx(0.1)
    assert "swap_rate.4k.own_keys" not in found
    assert found["ingest_tokens_per_s"].value == 2000.0
    assert found["ingest_tokens_per_s"].n == 6
    assert found["peak_rss_mb"].value == 500.0
    assert found["niah_depth.4k.0.25"].value == 1.0
