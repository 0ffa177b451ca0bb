import dataclasses
import math

import pytest
import torch

from megacontext.errors import InputError
from megacontext.lensnet import FEATURE_NAMES, N_FEATURES, SpanFacts, span_features

NAN = float("nan")


def facts(**changes):
    """Two spans of one context with cursor 100, then one of padding full of rubbish."""
    values = {
        "levels": torch.tensor([[0, 2, 7]]),
        "starts": torch.tensor([[64, 0, 1500]]),
        "stops": torch.tensor([[96, 64, 999]]),
        "costs": torch.tensor([[32, 1, -1]]),
        "depths": torch.tensor([[0, 4, 99]]),
        "fidelity": torch.tensor([[NAN, 0.5, NAN]]),
        "lexical": torch.tensor([[2.0, 8.0, 1e9]]),
        "attention": torch.tensor([[0.25, NAN, 1e9]]),
        "learned": torch.tensor([[-3.0, -1.0, 1e9]]),
        "likelihood": torch.tensor([[2.0, 18.0, 1e9]]),
        "told": torch.tensor([[False, False, True]]),
        "in_context": torch.tensor([[True, False, True]]),
        "newest": torch.tensor([[False, True, True]]),
        "root": torch.tensor([[False, True, True]]),
        "proposal": torch.tensor([[False, True, True]]),
        "mask": torch.tensor([[True, True, False]]),
        "cursor": torch.tensor([100]),
        "tail_start": torch.tensor([90]),
    }
    return SpanFacts(**(values | changes))


def test_names_are_as_many_as_features_and_differ():
    assert len(set(FEATURE_NAMES)) == N_FEATURES == 24


def test_values():
    got = span_features(facts())
    assert got.shape == (1, 3, N_FEATURES)
    assert got.dtype == torch.float32
    log = math.log
    want = {
        "level": (0, 2 / 8),
        "log_width": (log(33) / 10, log(65) / 10),
        "log_distance": (log(5) / 10, log(37) / 10),
        "log_cost": (log(33) / 10, log(2) / 10),
        "depth": (0, 4 / 8),
        "in_context": (1, 0),
        "in_tail": (1, 0),
        "newest": (0, 1),
        "root": (0, 1),
        "proposal": (0, 1),
        "fidelity": (0, log(1.5)),
        "fidelity_known": (0, 1),
        "lexical": (log(3), log(9)),
        "lexical_relative": (0.25, 1),
        "lexical_known": (1, 1),
        "attention": (0.25, 0),
        "attention_relative": (1, 0),
        "attention_known": (1, 0),
        "learned": (-3, -1),
        "learned_relative": (math.exp(-2), 1),
        "learned_known": (1, 1),
        "likelihood": (0.2, 1.8),
        "likelihood_relative": (math.exp(-4), 1),
        "likelihood_known": (1, 1),
    }
    for index, name in enumerate(FEATURE_NAMES):
        assert got[0, :2, index].tolist() == pytest.approx(want[name], abs=1e-6), name
    assert torch.equal(got[0, 2], torch.zeros(N_FEATURES))


def test_unknown_everywhere_is_zero_not_nan():
    unknown = torch.full((1, 3), NAN)
    scores = dict.fromkeys(("fidelity", "lexical", "attention", "learned", "likelihood"), unknown)
    got = span_features(facts(**scores))
    assert got.isfinite().all()
    assert torch.equal(got[..., 10:], torch.zeros(1, 3, N_FEATURES - 10))


def test_no_spans():
    empty = {
        name: value if name in ("cursor", "tail_start") else value[:, :0]
        for name, value in vars(facts()).items()
    }
    assert span_features(SpanFacts(**empty)).shape == (1, 0, N_FEATURES)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(SpanFacts)])
def test_wrong_shapes_are_named(name):
    if name == "mask":
        with pytest.raises(InputError, match="mask is"):
            span_features(facts(mask=torch.ones(3)))
        return
    with pytest.raises(InputError, match=f"{name} has shape"):
        span_features(facts(**{name: torch.zeros(4, 4)}))


def test_a_span_must_have_a_width():
    with pytest.raises(InputError, match="stops at or before its start"):
        span_features(facts(stops=torch.tensor([[96, 0, 999]])))


def test_what_was_told_before_sets_no_mark_for_what_is_news():
    nats = torch.tensor([[20.0, 8.0, 4.0]])
    known = {"likelihood": nats, "mask": torch.tensor([[True, True, True]])}
    known |= {"stops": torch.tensor([[96, 64, 1600]])}
    column = FEATURE_NAMES.index("likelihood_relative")

    def relative(*told):
        return span_features(facts(told=torch.tensor([told]), **known))[0, :, column].tolist()

    news = [1.0, math.exp(-3), math.exp(-4)]
    assert relative(False, False, False) == pytest.approx(news)
    assert relative(True, False, False) == pytest.approx([1.0, 1.0, math.exp(-1)])
    assert relative(True, True, True) == pytest.approx(news), "nothing is news"
