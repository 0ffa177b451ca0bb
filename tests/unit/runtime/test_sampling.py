import pytest
import torch
from transformers import GenerationConfig

from megacontext.errors import ConfigError, InputError, ModelError
from megacontext.runtime.sampling import TokenSampler

LOGITS = torch.tensor([0.0, 3.0, 2.9, 1.0, -2.0, 2.0])
NOTHING_SAID = torch.empty(0, dtype=torch.int64)


def draw(sampler, n=400, logits=LOGITS):
    return [sampler.choose(logits, NOTHING_SAID) for _ in range(n)]


def test_greedy_takes_the_maximum_and_ignores_the_models_temperature():
    sampler = TokenSampler(GenerationConfig(do_sample=False, temperature=5.0), seed=3)
    assert draw(sampler, 5) == [1] * 5


def test_the_same_seed_gives_the_same_tokens():
    config = GenerationConfig(do_sample=True, top_k=0)
    first, again, other = (draw(TokenSampler(config, seed=seed)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_sampling_follows_the_distribution():
    counts = torch.bincount(
        torch.tensor(draw(TokenSampler(GenerationConfig(do_sample=True, top_k=0)), 4000)),
        minlength=len(LOGITS),
    )
    assert (counts / 4000 - torch.softmax(LOGITS, 0)).abs().max() < 0.03


@pytest.mark.parametrize(
    ("overrides", "allowed"),
    [
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.5}, {1, 2}),
        ({"min_p": 0.3}, {1, 2, 5}),
        ({"temperature": 0.01}, {1}),
    ],
    ids=str,
)
def test_each_setting_restricts_the_choice(overrides, allowed):
    sampler = TokenSampler(GenerationConfig(top_k=0), do_sample=True, **overrides)
    assert set(draw(sampler)) == allowed


def test_repetition_penalty_acts_on_greedy_choice_too():
    sampler = TokenSampler(GenerationConfig(repetition_penalty=2.0))
    assert sampler.choose(LOGITS, torch.tensor([1, 4, 1])) == 2
    assert sampler.choose(LOGITS, torch.tensor([4])) == 1


@pytest.mark.parametrize(("given", "ends"), [(5, {5}), ([5, 2], {5, 2}), (None, set())])
def test_end_tokens_come_from_the_model(given, ends):
    sampler = TokenSampler(GenerationConfig(eos_token_id=given))
    assert {token for token in range(6) if sampler.is_end(token)} == ends
    assert TokenSampler(GenerationConfig(eos_token_id=given), eos_token_id=1).eos_ids == {1}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"tempreature": 1.0}, "unknown key 'tempreature'"),
        ({"do_sample": True, "temperature": 0.0}, "'temperature' has value 0.0"),
        ({"do_sample": True, "top_p": 1.5}, "'top_p' has value 1.5"),
        ({"top_k": -1, "do_sample": True}, "'top_k' has value -1"),
        ({"temperature": 0.7}, "temperature has no effect while do_sample is false"),
        ({"eos_token_id": "end"}, "eos_token_id"),
    ],
    ids=str,
)
def test_bad_overrides_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        TokenSampler(GenerationConfig(), **overrides)


def test_logits_that_are_no_numbers_are_refused():
    sampler = TokenSampler(GenerationConfig(do_sample=True))
    with pytest.raises(ModelError, match="not finite"):
        sampler.choose(torch.tensor([0.0, float("nan")]), NOTHING_SAID)
    with pytest.raises(InputError, match="one row"):
        sampler.choose(LOGITS[None], NOTHING_SAID)


def test_logits_of_any_dtype_and_no_side_effect():
    logits = LOGITS.to(torch.bfloat16)
    before = logits.clone()
    sampler = TokenSampler(GenerationConfig(do_sample=True, top_k=1))
    assert draw(sampler, 3, logits) == [1] * 3
    assert torch.equal(logits, before)
