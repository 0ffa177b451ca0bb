"""The harness's own evaluator over the local tasks, and the command as it is documented."""

from __future__ import annotations

import functools
import json
import logging
import re
import runpy
import shlex
import sys

import pytest
import torch
from architecture.repository import ROOT
from command_line import Done

from megacontext.evaluation.lm_eval_documents import recall_documents
from megacontext.evaluation.long_requests import LongRequests
from megacontext.runtime.session import Session, SessionConfig

RUN = "megacontext.evaluation.lm_eval_run"
RECALL = ["megacontext_recall", "megacontext_recall_choice"]
PROSE = "megacontext_prose"
LIMIT = 4


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def evaluate(lm_eval):
    """Runs tasks on the bundled model; keywords as in ``--model_args``."""
    from lm_eval.tasks import TaskManager

    import megacontext.evaluation.lm_eval_model  # noqa: F401
    from megacontext.evaluation.lm_eval_run import TASKS

    # Without the harness's own tasks, which are many.
    tasks_here = TaskManager(include_path=str(TASKS), include_defaults=False)

    def run(tasks, *, limit, use_cache=None, **arguments):
        return lm_eval.simple_evaluate(
            model="megacontext",
            model_args={"model": "bundled:tiny", "strip_notes": True, **arguments},
            tasks=tasks,
            task_manager=tasks_here,
            limit=limit,
            use_cache=use_cache,
            bootstrap_iters=0,
        )

    return run


@pytest.fixture(scope="module")
def found(evaluate):
    """All tasks once."""
    return evaluate([*RECALL, PROSE], limit=LIMIT, budget=1024, policy="lexical", stride=256)


def test_recall_over_long_contexts_needs_the_focus(evaluate, found):
    results = found["results"]
    assert results["megacontext_recall_choice"]["acc,none"] >= 0.75
    assert results["megacontext_recall"]["exact_match,stripped"] >= 0.5
    assert found["config"]["budget"] == 1024
    # Every answer, its four choices, and the stretch of prose.
    assert found["config"]["requests_beyond_budget"] == LIMIT * (1 + 4 + 1)
    blind = evaluate(RECALL[:1], limit=LIMIT, budget=1024, policy="recency")["results"]
    assert blind["megacontext_recall"]["exact_match,stripped"] <= 0.25


def test_every_response_stands_by_its_document(found):
    for number, sample in enumerate(found["samples"]["megacontext_recall_choice"]):
        document = recall_documents()[number]
        assert sample["doc"]["question"] == document["question"]
        likelihoods = [float(response[0][0]) for response in sample["resps"]]
        best = max(range(4), key=lambda choice: likelihoods[choice])
        assert sample["acc"] == float(best == document["label"])


def test_rolling_likelihood_is_that_of_the_text(found):
    sample = found["samples"][PROSE][0]
    text = sample["doc"]["text"]
    with Session(SessionConfig()) as session, LongRequests(session, stride=256) as requests:
        base = session.base
        first = torch.tensor([base.tokenizer.eos_token_id])
        log_probs = requests.score(first, base.encode(text), rolling=True).log_probs
    assert len(log_probs) > 1024 + 256
    assert sample["resps"][0][0] == pytest.approx(float(log_probs.double().sum()), rel=1e-4)
    assert 1 < found["results"][PROSE]["bits_per_byte,none"] < 3


def test_the_harnesss_cache_is_used_the_second_time(evaluate, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first = evaluate(RECALL, limit=1, use_cache=cache)

    def fail(*_args, **_options):
        raise AssertionError("asked again")

    monkeypatch.setattr(LongRequests, "score", fail)
    monkeypatch.setattr(LongRequests, "write", fail)
    assert evaluate(RECALL, limit=1, use_cache=cache)["results"] == first["results"]


def documented_command() -> list[str]:
    page = (ROOT / "docs/lm_eval.md").read_text(encoding="utf-8")
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL):
        if "megacontext_recall" in block:
            return shlex.split(block.replace("\\\n", " "))
    raise AssertionError("docs/lm_eval.md has no command that runs the local tasks")


@pytest.fixture
def command(lm_eval, monkeypatch, tmp_path, capsys):
    """``python -m megacontext.evaluation.lm_eval_run …`` in this process."""
    import lm_eval.tasks
    import lm_eval.utils

    # Without the harness's own tasks, which are many.
    few = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    # Its log goes to the standard error of the first run otherwise.
    log = logging.getLogger("lm_eval")
    monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", False)
    for name, value in (("handlers", []), ("level", log.level), ("propagate", log.propagate)):
        monkeypatch.setattr(log, name, value)
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["lm_eval_run.py", *words])
        monkeypatch.delitem(sys.modules, RUN, raising=False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            runpy.run_module(RUN, run_name="__main__")
        return Done(int(exit_.value.code or 0), *capsys.readouterr())

    return run


def test_the_documented_command_runs_as_it_stands(command, tmp_path):
    words = documented_command()
    assert words[:3] == ["python", "-m", RUN]
    done = command(*words[3:])
    assert done.status == 0, done.err
    for task in (*RECALL, PROSE):
        assert re.search(rf"\|{task} *\|", done.out), done.out
    (results,) = (tmp_path / "runs").rglob("results_*.json")
    written = json.loads(results.read_text(encoding="utf-8"))
    assert written["config"]["requests_beyond_budget"] > 0
    assert set(written["results"]) == {*RECALL, PROSE}


def test_a_wrong_model_argument_is_one_line(command):
    done = command("--model", "megacontext", "--model_args", "bogus=1", "--tasks", PROSE)
    assert done.status == 2
    assert "lm_eval: model_args: unknown key 'bogus'" in done.err.splitlines()[-1]
    assert "Traceback" not in done.err


def test_without_the_harness_one_line_says_what_to_install(monkeypatch, capsys):
    for name in ("lm_eval", "lm_eval.__main__"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys, "argv", ["lm_eval_run.py", "--model", "megacontext"])
    monkeypatch.delitem(sys.modules, RUN, raising=False)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(RUN, run_name="__main__")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "lm_eval: not installed; install megacontext[lm-eval]\n"
