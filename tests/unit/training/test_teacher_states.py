from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.errors import ConfigError, DataError
from megacontext.training.teacher_states import Teacher, TeacherConfig, weights_fingerprint

IDS = torch.arange(40) % 200


@pytest.fixture(scope="module")
def base():
    return tiny_base_model()


def test_final_states_make_the_models_own_logits(base):
    states = Teacher(base, TeacherConfig(dtype="float32"), 64).states(IDS)
    assert states.shape == (1, 40, base.d_model)
    with torch.inference_mode():
        expected = base.model(input_ids=IDS[None]).logits[0]
        logits = base.model.lm_head(states[0])
    assert torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt-neox", "gemma3"])
def test_a_stack_holds_the_layers_in_the_order_asked_for(architecture):
    base = tiny_base_model(architecture)
    config = TeacherConfig(layers=(-1, 0, 2), dtype="float32")
    teacher = Teacher(base, config, 64)
    states = teacher.states(IDS)
    assert teacher.layers == (3, 0, 2)
    with torch.inference_mode():
        hidden = base.model(input_ids=IDS[None], output_hidden_states=True).hidden_states
    assert torch.allclose(states[0], base.features(IDS), atol=1e-5)
    assert torch.allclose(states[1], hidden[0][0], atol=1e-5)
    assert torch.allclose(states[2], hidden[2][0], atol=1e-5)


def test_states_are_half_precision_by_default(base):
    states = Teacher(base, TeacherConfig(), 64).states(IDS)
    assert states.dtype == torch.float16
    assert torch.equal(states[0], base.features(IDS).half())


def test_states_too_large_for_the_dtype_are_refused():
    base = tiny_base_model()
    with torch.no_grad():
        base.model.model.norm.weight.mul_(1e6)
    with pytest.raises(DataError, match=r"teacher.dtype"):
        Teacher(base, TeacherConfig(), 64).states(IDS)
    assert torch.isfinite(Teacher(base, TeacherConfig(dtype="float32"), 64).states(IDS)).all()


@pytest.mark.parametrize("layers", [(4,), (-5,), (3, -1)])
def test_layers_that_cannot_be_meant_are_refused(base, layers):
    with pytest.raises(ConfigError, match=r"teacher.layers"):
        Teacher(base, TeacherConfig(layers=layers), 64)


def test_more_tokens_than_positions_are_refused(base):
    Teacher(base, TeacherConfig(), base.max_positions)
    with pytest.raises(ConfigError, match="128 positions"):
        Teacher(base, TeacherConfig(), base.max_positions + 1)


def test_the_fingerprint_is_that_of_the_weights():
    fingerprints = {weights_fingerprint(tiny_base_model(seed=seed).model) for seed in (0, 1)}
    assert len(fingerprints) == 2
    assert weights_fingerprint(tiny_base_model(seed=0).model) in fingerprints


def test_the_fingerprint_survives_another_dtype():
    single = weights_fingerprint(tiny_base_model().model)
    assert weights_fingerprint(tiny_base_model(dtype=torch.bfloat16).model) == single


def test_one_changed_row_changes_the_fingerprint(base):
    before = weights_fingerprint(base.model)
    with torch.no_grad():
        base.model.model.layers[1].mlp.up_proj.weight[7] += 0.1
    assert weights_fingerprint(base.model) != before
