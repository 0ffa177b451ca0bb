"""Recorded sessions: what a snapshot holds, and that its labels say what detail is worth."""

from __future__ import annotations

import dataclasses
import itertools
import random
import tempfile

import pytest
import torch
from engine_cases import learned_gistnet
from tiny_models import tiny_base_model
from tiny_training import corpus_documents

from megacontext.errors import CheckpointError, ConfigError
from megacontext.gistnet import GistNet
from megacontext.lensnet import (
    FEATURE_NAMES,
    N_FEATURES,
    LensNet,
    LensNetConfig,
    Snapshot,
    entry_legality,
)
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.engine import EngineConfig
from megacontext.tasks.recall_documents import Prose
from megacontext.training.lens_recorder import LensRecorder, RecordConfig, _Place
from megacontext.training.lens_texts import LensTexts

K = 32
CONFIG = RecordConfig(
    sessions=2, tokens=(160, 200), facts=2, asks=2, rounds=2, calm=1, horizon=6, proposals=3,
    entries=2,
)  # fmt: skip
HABITS = EngineConfig(budget=448, tail_tokens=32, query_tokens=40)


@pytest.fixture(scope="module")
def base():
    return tiny_base_model(max_positions=512)


@pytest.fixture(scope="module")
def texts(base):
    return LensTexts(base.tokenizer.backend_tokenizer, Prose(corpus_documents()))


def make_lens(base, *, gist_width=None, prior=1.0):
    return LensNet(
        LensNetConfig(
            d_model=base.d_model, gist_width=gist_width or base.d_model, key_width=16,
            n_queries=2, d_hidden=16, n_heads=2, d_ff=16, key_vocabulary=base.vocab_size,
            lexical_prior=prior,
        )
    ).eval()  # fmt: skip


def make_recorder(base, texts, *, gistnet=None, prior=1.0, habits=HABITS, config=CONFIG):
    net = GistNet.untrained(base.d_model) if gistnet is None else gistnet
    lens = make_lens(base, gist_width=net.config.gist_width, prior=prior)
    return LensRecorder(base, net, lens, texts, habits, config)


@pytest.fixture(scope="module")
def recorder(base, texts):
    return make_recorder(base, texts)


@pytest.fixture(scope="module")
def shots(recorder):
    return list(recorder.session(0))


def same(first, second):
    return all(
        torch.equal(getattr(first, f.name).nan_to_num(), getattr(second, f.name).nan_to_num())
        if getattr(first, f.name).is_floating_point()
        else torch.equal(getattr(first, f.name), getattr(second, f.name))
        for f in dataclasses.fields(Snapshot)
    )


def raw_starts(shot):
    return set(shot.entry_starts[shot.entry_levels == 0].tolist())


def test_what_a_snapshot_holds(base, shots):
    # A calm place and two looks, of at most two rounds each.
    assert 3 <= len(shots) <= 6
    for shot in shots:
        n, m = len(shot.entry_levels), len(shot.cache_levels)
        assert shot.entry_vectors.shape == (n, base.d_model)
        assert shot.entry_features.shape == (n, N_FEATURES)
        assert shot.cache_vectors.shape == (m, base.d_model)
        assert shot.cache_features.shape == (m, N_FEATURES)
        assert shot.tail_hidden.shape[1] == base.d_model
        assert 1 <= len(shot.tail_hidden) <= HABITS.query_tokens
        stored = (shot.entry_vectors, shot.cache_vectors, shot.tail_hidden)
        assert {tensor.dtype for tensor in stored} == {torch.float16}
        # Proposals are blocks of history before the tail, each once, all of them measured.
        assert not shot.cache_levels.any()
        assert (shot.cache_starts % K == 0).all()
        assert shot.cache_starts.unique().numel() == m
        assert (shot.cache_starts < shot.tail_start).all()
        assert shot.cache_utility.isfinite().all()
        assert shot.cache_features[:, FEATURE_NAMES.index("proposal")].all()
        legality = entry_legality(
            shot.entry_levels[None], shot.entry_starts[None], torch.ones(1, n, dtype=torch.bool),
            cursor=shot.cursor[None], tail_start=shot.tail_start[None], block_size=K,
        )  # fmt: skip
        assert torch.equal(shot.entry_can_expand, legality.can_expand[0])
        assert torch.equal(shot.entry_can_collapse, legality.can_collapse[0])
        # Of the entries only a few are tried out, and only moves that are possible.
        measured = ~shot.entry_utility.isnan()
        assert int(measured.sum()) == CONFIG.entries
        assert (shot.entry_can_expand | shot.entry_can_collapse)[measured].all()


def test_of_many_proposals_evidence_and_a_few_others_are_measured(base, texts, shots):
    few = CONFIG.model_copy(update={"labelled": 2})
    recorder = make_recorder(base, texts, config=few)
    measured = 0
    for shot in recorder.session(0):
        known = ~shot.cache_utility.isnan()
        assert int(known.sum()) == min(2, len(known))
        measured += int((~known).sum())
    assert measured, "some are left out"
    whole = next(iter(recorder.session(0)))
    known = ~whole.cache_utility.isnan()
    assert torch.equal(whole.cache_starts, shots[0].cache_starts)
    torch.testing.assert_close(whole.cache_utility[known], shots[0].cache_utility[known])

    def labelled(evidence, most):
        place = _Place(torch.empty(0), torch.empty(0), torch.empty(0), evidence)
        limited = make_recorder(base, texts, config=CONFIG.model_copy(update={"labelled": most}))
        scores = torch.tensor([0.1, 0.9, 0.2, 0.8])
        drawn = limited._labelled(torch.tensor([3, 5, 8, 9]), scores, place, random.Random(0))
        return drawn.tolist()

    assert {3, 1} <= set(labelled((5, 9, 70), 3)), "evidence comes first"
    assert labelled((5, 9, 70), 1) == [1]
    assert labelled((), 0) == labelled((), 4) == [0, 1, 2, 3]
    assert len(set(labelled((), 3))) == 3
    assert labelled((), 1) == [1], "then what the lens likes best"
    assert labelled((5,), 2) == [1, 3]


def test_calm_places_come_first_and_ask_with_the_newest_tokens(base, texts, recorder, shots):
    calm = shots[0]
    length = max(int(shot.cursor) for shot in shots)
    assert length / 2 <= int(calm.cursor) <= length - CONFIG.horizon
    assert len(calm.tail_hidden) == HABITS.query_tokens
    asked = [shot for shot in shots if int(shot.cursor) == length]
    assert len(asked) >= 2, "questions are asked at the end of the text"


def test_a_session_depends_on_seed_number_and_lens_alone(base, texts, recorder, shots):
    torch.manual_seed(77)
    again = list(make_recorder(base, texts).session(0))
    assert len(again) == len(shots)
    assert all(same(a, b) for a, b in zip(again, shots, strict=True))
    other = list(recorder.session(1))
    assert not same(other[0], shots[0])
    reseeded = LensTexts(texts.tokenizer, texts.prose, seed=5)
    assert not same(next(make_recorder(base, reseeded).session(0)), shots[0])


class WatchedTexts(LensTexts):
    """Keeps what was drawn."""

    def draw(self, number, tokens, facts):
        text = super().draw(number, tokens, facts)
        self.drawn = [*getattr(self, "drawn", []), (number, text)]
        return text


def test_sessions_do_not_read_the_texts_that_keys_are_trained_on(base, texts):
    watched = WatchedTexts(texts.tokenizer, texts.prose)
    config = CONFIG.model_copy(update={"asks": 0})
    recorder = make_recorder(base, watched, config=config)
    for number in (0, 1, 7):
        next(recorder.session(number))
    numbers = [number for number, _ in watched.drawn]
    assert len(set(numbers)) == 3
    assert max(numbers) < 0, "those have the numbers 0, 1, 2, …"


def test_the_second_round_stands_where_the_lens_has_led(base, texts):
    """A prior on BM25 makes the lens open what it proposes."""
    recorder = make_recorder(base, texts, config=CONFIG.model_copy(update={"calm": 0, "asks": 4}))
    followed = 0
    for number in range(3):
        shots = list(recorder.session(number))
        for first, second in itertools.pairwise(shots):
            if not torch.equal(first.tail_hidden, second.tail_hidden):
                continue  # another look
            opened = raw_starts(second) - raw_starts(first)
            assert opened
            # What the lens asks for, and its neighbours.
            proposed = first.cache_starts.tolist()
            assert opened <= {start + step for start in proposed for step in (-K, 0, K)}
            followed += 1
            # What is open now is weighed as if it still were a gist, or it would be given up.
            again = {
                int(start): bool(is_cheap)
                for start, is_cheap in zip(
                    second.cache_starts, second.cache_features[:, 4] > 0, strict=True
                )
            }
            assert all(again.get(start, True) for start in opened)
    assert followed >= 3


def test_a_calm_lens_leaves_the_context_alone(base, texts):
    """Nothing to score, nothing to edit: such a look has a single round."""
    recorder = make_recorder(base, texts, prior=0.0)
    shots = list(recorder.session(0))
    assert len(shots) == CONFIG.calm + CONFIG.asks


def test_with_gists_read_as_keys_and_values(base, texts):
    net = learned_gistnet(base, slots=2, gist_width=2 * base.d_model)
    shots = list(make_recorder(base, texts, gistnet=net).session(0))
    assert shots[0].entry_vectors.shape[1] == net.config.gist_width == 2 * base.d_model
    assert all(shot.cache_utility.isfinite().all() for shot in shots)
    assert any(shot.cache_utility.abs().max() > 1e-3 for shot in shots if len(shot.cache_utility))


def test_sessions_leave_no_files(recorder, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    session = recorder.session(0)
    next(session)
    assert list(tmp_path.iterdir())
    session.close()
    assert not list(tmp_path.iterdir())
    recorder.check()
    assert not list(tmp_path.iterdir())


def test_statements_are_worth_more_than_noise():
    """With the bundled model, which answers from its window: labels mean something."""
    base = BaseModel.from_pretrained("bundled:tiny")
    texts = WatchedTexts(base.tokenizer.backend_tokenizer, Prose(corpus_documents()))
    config = RecordConfig(
        sessions=1, tokens=(300,), facts=3, asks=4, rounds=1, calm=0, horizon=8, proposals=4,
        entries=0,
    )  # fmt: skip
    habits = EngineConfig(budget=256, tail_tokens=32)
    recorder = make_recorder(base, texts, config=config, habits=habits)
    told, noise = [], []
    for number in range(3):
        for shot in recorder.session(number):
            (_, text) = texts.drawn[-1]
            for start, worth in zip(
                shot.cache_starts.tolist(), shot.cache_utility.tolist(), strict=True
            ):
                (told if start // K in text.told else noise).append(worth)
    assert min(len(told), len(noise)) >= 5
    assert max(told) > 5.0
    assert sum(told) / len(told) > 1.0
    assert abs(sum(noise) / len(noise)) < 0.5 * sum(told) / len(told)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"asks": 0, "calm": 0}, "asks and calm must not both be 0"),
        ({"tokens": []}, "'tokens'"),
        ({"tokens": [4096, 64]}, "'tokens.1' has value 64"),
        ({"tokens": [128], "horizon": 33}, "expected at least 132"),
        ({"sessions": 0}, "'sessions' has value 0"),
        ({"rounds": 0}, "'rounds' has value 0"),
    ],
)
def test_values_that_record_nothing_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        RecordConfig.parse(values)


def test_what_sessions_would_refuse_is_known_before(base, texts):
    make_recorder(base, texts).check()
    for habits in ({"budget": 1024}, {"gist_slots": 2}):
        with pytest.raises(ConfigError, match=next(iter(habits))):
            make_recorder(base, texts, habits=EngineConfig.parse(habits)).check()
    other = learned_gistnet(tiny_base_model("llama", max_positions=512))
    with pytest.raises(CheckpointError, match="made for a base"):
        make_recorder(base, texts, gistnet=other).check()
