from __future__ import annotations

import pytest
import torch

from megacontext.errors import ConfigError
from megacontext.evaluation.lm_eval_config import LmEvalConfig
from megacontext.runtime.session import DecodeConfig, SessionConfig


def test_flat_arguments_reach_session_and_engine():
    config = LmEvalConfig.from_model_args(
        {
            "model": "some/model",
            "policy": "attention",
            "budget": 2048,
            "tail_tokens": 128,
            "strip_notes": True,
            "batch_size": "auto",
            "max_batch_size": 8,
        }
    )
    assert (config.model, config.policy, config.strip_notes) == ("some/model", "attention", True)
    assert (config.engine.budget, config.engine.tail_tokens) == (2048, 128)
    assert config.engine.query_tokens == 64


def test_the_defaults_are_those_of_a_session():
    config = LmEvalConfig.from_model_args({})
    session = SessionConfig()
    assert all(getattr(config, name) == value for name, value in session)
    assert (config.stride, config.strip_notes, config.add_bos_token) == (32, False, False)
    assert config.look_again == DecodeConfig().look_again


def test_the_harnesss_usual_name_of_a_model_works_too():
    assert LmEvalConfig.from_model_args({"pretrained": "a/b"}).model == "a/b"


def test_nested_engine_keys_and_flat_ones_go_together():
    arguments = {"budget": 512, "engine": {"allocator": {"max_edits": 3}}}
    config = LmEvalConfig.from_model_args(arguments)
    assert (config.engine.budget, config.engine.allocator.max_edits) == (512, 3)
    assert arguments == {"budget": 512, "engine": {"allocator": {"max_edits": 3}}}


@pytest.mark.parametrize("wanted", ["cuda:0", "cuda"])
def test_a_gpu_that_is_not_there_becomes_the_cpu(wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert LmEvalConfig.from_model_args({"device": wanted}).device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert LmEvalConfig.from_model_args({"device": wanted}).device == wanted


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"bogus": 1}, "unknown key 'bogus'"),
        ({"budget": 1}, "engine.budget"),
        ({"policy": "bogus"}, "policy"),
        ({"stride": 0}, "stride"),
        ({"model": "a", "pretrained": "b"}, "model and pretrained"),
        ({"budget": 512, "engine": {"budget": 256}}, "budget is given twice"),
        ({"tail_tokens": 512, "budget": 512}, "expected less than budget"),
    ],
)
def test_what_makes_no_sense_is_one_line(arguments, complaint):
    with pytest.raises(ConfigError, match=complaint) as error:
        LmEvalConfig.from_model_args(arguments)
    assert "\n" not in str(error.value)
