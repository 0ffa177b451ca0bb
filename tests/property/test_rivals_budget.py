"""No rival reads more than the budget, whatever the lengths of history, prompt and answer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from engine_cases import config, words
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_base_model

from megacontext.errors import ConfigError, InputError
from megacontext.evaluation.baselines import Informed, RivalsConfig, rivals
from megacontext.memory import Memory
from megacontext.runtime.engine import Engine

NAMES = (
    "window",
    "sink_window",
    "bm25",
    "bm25_few",
    "own_keys",
    "infllm",
    "gists_only",
    "focus_only",
    "oracle",
    "megacontext",
)


class Watched:
    """A base model that notes how many entries its context has whenever it reads."""

    def __init__(self, architecture):
        self.base = tiny_base_model(architecture, max_positions=256)
        self.sizes: list[int] = []
        prefill, nll = self.base.prefill, self.base.nll

        def watched(context, *rest, **options):
            self.sizes.append(len(context))
            return prefill(context, *rest, **options)

        def watched_nll(context, targets):
            self.sizes.append(len(context) + len(targets))
            return nll(context, targets)

        self.base.prefill, self.base.nll = watched, watched_nll


@pytest.fixture(scope="module", params=["qwen3", "gpt-neox"])
def watched(request):
    return Watched(request.param)


@pytest.fixture(scope="module")
def memory(watched):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.mctx"
        with Memory.create(path, Engine.identity(watched.base)) as memory:
            Engine(watched.base, memory, config=config()).ingest(words(1400, seed=5))
            yield memory


@settings(max_examples=6)
@given(data=st.data())
def test_raw_rows_gists_prompt_and_reserve_fit_the_budget(watched, memory, data):
    budget = data.draw(st.integers(128, 256), label="budget")
    prompt = "x" * data.draw(st.integers(1, budget // 4), label="prompt")
    new = data.draw(st.integers(1, 24), label="new tokens")
    cursor = data.draw(st.integers(1, 1390), label="cursor")
    horizon = data.draw(st.integers(1, 10), label="horizon")
    share = data.draw(st.sampled_from([0.01, 0.25, 1.0]), label="recent share")
    # Exact: what is read at once is counted.
    habits = RivalsConfig(engine=config(budget=budget, kv="exact"), recent_share=share)
    for rival in rivals(NAMES, watched.base, memory, config=habits):
        if isinstance(rival, Informed):
            rival.inform("iris", [(64, 80)])
        watched.sizes.clear()
        try:
            rival.answer(prompt, "lotus jade", max_new_tokens=new, stop="\0")
        except (ConfigError, InputError):
            # The coarsest window and the prompt alone are too much; nothing was read.
            assert rival.name in NAMES[5:]
        else:
            raw = sum(end - start for start, end in rival.raw_spans)
            assert 0 < raw <= budget - len(prompt) - new
            # Before its answer, a rival may read as much to find out what to read.
            assert watched.sizes[-1] + new <= budget
            assert max(watched.sizes) <= budget
        watched.sizes.clear()
        loss = rival.nll(cursor, memory.tokens(cursor, cursor + horizon).long())
        assert loss.shape == (horizon,)
        assert bool(torch.isfinite(loss).all())
        assert max(watched.sizes) <= budget
        assert rival.raw_spans[-1][1] == cursor
