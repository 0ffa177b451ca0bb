"""Texts read by themselves, several in one forward, beside one forward for each."""

from __future__ import annotations

import pytest
import torch
from engine_cases import words

from megacontext.runtime.plain_decode import raw_context
from megacontext.runtime.plain_reading import final_states, read_plain


def plain(base, ids):
    """By the model as transformers runs it, one text at a time."""
    with torch.no_grad():
        output = base.model(input_ids=ids[None], output_hidden_states=True)
    likelihood = output.logits[0, :-1].float().log_softmax(-1)
    return output.hidden_states[-1][0], -likelihood.gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize("lengths", [(9,), (9, 4), (1, 12, 5)])
def test_each_text_is_read_as_if_alone(base, lengths):
    texts = [base.encode(words(20, seed=number))[:n] for number, n in enumerate(lengths)]
    readings = read_plain(base, texts)
    assert len(readings) == len(texts)
    for text, reading in zip(texts, readings, strict=True):
        hidden, nll = plain(base, text)
        torch.testing.assert_close(reading.hidden, hidden)
        torch.testing.assert_close(reading.nll, nll)
        assert reading.nll.dtype == torch.float32


def test_what_it_gives_may_be_trained_on(base):
    [reading] = read_plain(base, [base.encode("the zebra sleeps")])
    weight = torch.ones(1, requires_grad=True)
    (reading.hidden.sum() * weight + reading.nll.sum() * weight).backward()
    assert weight.grad is not None


def test_final_states_are_caught_only_meanwhile(base):
    context = raw_context(base, base.encode("the zebra sleeps"))
    with final_states(base.model) as caught:
        base.prefill(context)
    base.prefill(context)
    assert [states.shape for states in caught] == [(1, context.n_rows, base.d_model)]
    with pytest.raises(RuntimeError, match="inside"), final_states(base.model) as caught:
        raise RuntimeError("inside")
    base.prefill(context)
    assert not caught
