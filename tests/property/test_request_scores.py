"""Scores of token sequences, whatever their lengths: nothing is lost, and nothing looks ahead."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model, tiny_tokenizer

from megacontext.evaluation.long_requests import LongRequests
from megacontext.runtime.engine import EngineConfig
from megacontext.runtime.session import Session, SessionConfig

BUDGET = 128


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "qwen3"
    tiny_model("qwen3").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    engine = EngineConfig(budget=BUDGET, tail_tokens=32, query_tokens=16)
    with Session(SessionConfig(model=str(folder), engine=engine)) as session:
        yield session


def tokens(seed: int, count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25)
@given(
    n=st.integers(1, 400),
    h=st.integers(1, 120),
    stride=st.integers(1, 48),
    seed=st.integers(0, 99),
    rolling=st.booleans(),
)
def test_every_target_is_scored_once_and_by_what_precedes_it(session, n, h, stride, seed, rolling):
    ids = tokens(seed, n + h)
    with LongRequests(session, stride=stride) as requests:
        whole = requests.score(ids[:n], ids[n:], rolling=rolling).log_probs
        assert whole.shape == (h,)
        assert bool((whole <= 0).all())
        assert requests.beyond_window == int(n + h > BUDGET)
        # Other tokens behind a place change nothing before it.
        cut = 1 + seed % h
        other = torch.cat((ids[: n + cut], (ids[n + cut :] + 1) % 256))
        again = requests.score(other[:n], other[n:], rolling=rolling).log_probs
    torch.testing.assert_close(again[:cut], whole[:cut], rtol=1e-4, atol=1e-4)


@settings(max_examples=25)
@given(n=st.integers(1, 60), h=st.integers(2, 60), seed=st.integers(0, 99))
def test_a_continuation_may_be_scored_in_parts_where_all_fits(session, n, h, seed):
    ids = tokens(seed, n + h)
    cut = n + 1 + seed % (h - 1)
    with LongRequests(session) as requests:
        whole = requests.score(ids[:n], ids[n:]).log_probs
        parts = (requests.score(ids[:n], ids[n:cut]), requests.score(ids[:cut], ids[cut:]))
    torch.testing.assert_close(
        torch.cat([part.log_probs for part in parts]), whole, rtol=1e-4, atol=1e-4
    )
