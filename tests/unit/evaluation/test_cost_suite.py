"""The arithmetic of suite ``cost``, its memories, and one whole run at small sizes."""

from __future__ import annotations

import pytest

from megacontext.errors import ConfigError
from megacontext.evaluation.cost_config import CostSuiteConfig
from megacontext.evaluation.cost_kv import loss_results, refocus_results
from megacontext.evaluation.cost_memories import approach, make_memory
from megacontext.evaluation.cost_suite import decode_results
from megacontext.evaluation.kv_modes import Compared, RefocusTime
from megacontext.memory import Memory
from megacontext.runtime.session import Session, SessionConfig

SECONDS = {
    "exact.10": [2.0, 2.0, 9.0],
    "exact.99": [3.0, 3.0, 3.0],
    "incremental.10": [1.25, 1.25, 1.25],
    "incremental.99": [1.5, 1.5, 1.5],
    "remembered": [4.0, 4.0, 4.0],
    "plain": [1.0, 1.0, 7.0],
}


def test_decode_ratios_are_rates_and_flatness_is_time():
    results = decode_results(SECONDS, [10, 99], "incremental")
    values = {name: estimate.value for name, estimate in results.items()}
    assert values == {
        "decode_ratio": 0.8,
        "time_flatness": 1.2,
        "decode_ratio.exact": 0.5,
        "time_flatness.exact": 1.5,
        "decode_ratio.incremental": 0.8,
        "time_flatness.incremental": 1.2,
        "decode_ratio.exact.99": 1 / 3,
        "decode_ratio.incremental.99": 1 / 1.5,
        "decode_ratio.remembered": 0.25,
        "plain_tokens_per_s": 1.0,
    }
    assert decode_results(SECONDS, [10, 99], "exact")["decode_ratio"].value == 0.5
    assert {estimate.n for estimate in results.values()} == {3}


def test_only_refocuses_of_that_many_edits_count():
    times = [
        RefocusTime(0, 4, 10.0, {"exact": 10.0, "incremental": 2.0}),
        RefocusTime(1, 4, 1.0, {"exact": 9.0, "incremental": 1.0}),
        RefocusTime(2, 4, 1.0, {"exact": 9.0, "incremental": 2.0}),
        RefocusTime(1, 3, 100.0, {"exact": 1.0, "incremental": 1.0}),
        RefocusTime(0, 5, 1.0, {"exact": 9.0, "incremental": 1.0}),
    ]
    found = {name: (each.value, each.n) for name, each in refocus_results(times, 4).items()}
    assert found == {
        "refocus_incremental_ratio": (0.3, 3),
        "refocus_incremental_ratio.reading": (0.2, 3),
        "refocus_incremental_ratio.first_look": (0.6, 1),
    }
    assert "refocus_incremental_ratio.first_look" not in refocus_results(times, 3)
    with pytest.raises(ConfigError, match="none of 5 refocuses made 6 edits"):
        refocus_results(times, 6)


def test_the_larger_loss_stands_for_both():
    prose = [Compared(2.0, 2.5, True, True), Compared(2.0, 2.1, True, True)]
    answers = [Compared(1.0, 1.1, True, False), Compared(1.0, 1.3, False, False)]
    results = loss_results(prose, answers)
    assert results["incremental_delta_nll.prose"].value == pytest.approx(0.3)
    assert results["incremental_delta_nll.recall"].value == pytest.approx(0.2)
    assert results["incremental_delta_nll"] == results["incremental_delta_nll.prose"]
    assert results["incremental_answers_lost"].value == 0.5
    assert loss_results(answers, prose)["incremental_delta_nll"].value == pytest.approx(0.3)


@pytest.fixture(scope="module")
def session():
    with Session(SessionConfig(lens="none")) as session:
        yield session


@pytest.fixture(scope="module")
def memory(session, tmp_path_factory):
    said = []
    folder = tmp_path_factory.mktemp("cost")
    path = make_memory(session, folder, 5_000, 0, said.append)
    assert said[-1] == "ingesting 5,000 of 5,000 tokens"
    with Memory.open(path) as memory:
        yield memory


def test_a_memory_has_exactly_the_length_and_is_made_once(session, memory):
    said = []
    assert memory.n_tokens == 5_000
    again = make_memory(session, memory.path.parent, 5_000, 0, said.append)
    assert (again, said) == (memory.path, [])


def test_what_was_begun_is_begun_anew(session, memory):
    folder = memory.path.parent
    half = memory.path.with_suffix(".begun")
    half.mkdir()
    (half / "L0.ctx").write_bytes(b"half")
    other = make_memory(session, folder, 2_048, 0, lambda _: None)
    assert other != memory.path
    with Memory.open(other) as short:
        assert short.tokens().tolist() == memory.tokens(0, 2_048).tolist()


def test_an_approach_leaves_a_full_window_at_the_end(session, memory):
    engine = session.engine(memory)
    coarsest = engine.context.cost
    approach(engine, 4)
    assert engine.context.check().cursor == memory.n_tokens
    assert engine.context.cost > max(coarsest, 0.9 * engine.config.budget)
    assert [record.cursor for record in engine.focus.records] == [4904, 4936, 4968, 5000]


def test_config_of_the_quick_suite_is_one():
    from megacontext.cli.bench_command import _QUICK_COST
    from megacontext.config import load_config

    quick = load_config(CostSuiteConfig, None, _QUICK_COST)
    assert quick.lengths == (10_000, 200_000)
    assert quick.prefill_batches == (1, 4)
