from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megacontext.errors import CheckpointError
from megacontext.training.train_state import (
    load_state,
    prefixed,
    require_shapes,
    save_state,
    under,
)

STATE = {"model|a": torch.arange(6.0).reshape(2, 3), "optim|a|step": torch.tensor(3.0)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "checkpoint.safetensors"


def test_a_state_comes_back_as_it_was(path):
    transposed = torch.arange(6).reshape(2, 3).T
    learned = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    save_state(path, STATE | {"t": transposed, "p": learned}, {"step": "7", "losses": "[1.5]"})
    tensors, metadata = load_state(path)
    assert metadata == {"step": "7", "losses": "[1.5]"}
    for name, value in (STATE | {"t": transposed, "p": learned}).items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
        assert not tensors[name].requires_grad
    assert tensors.keys() == STATE.keys() | {"t", "p"}


def test_a_new_state_takes_the_place_of_the_old_one(path):
    save_state(path, STATE, {"step": "1"})
    path.with_suffix(".tmp").write_bytes(b"half of one")
    save_state(path, {"model|b": torch.zeros(1)}, {"step": "2"})
    tensors, metadata = load_state(path)
    assert (set(tensors), metadata["step"]) == ({"model|b"}, "2")
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_state_that_cannot_be_written_leaves_the_old_one(path):
    save_state(path, STATE, {"step": "1"})
    with pytest.raises(TypeError):
        save_state(path, STATE, {"step": 2})
    assert load_state(path)[1] == {"step": "1"}


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "missing"])
def test_a_damaged_state_is_refused(path, damage):
    save_state(path, STATE, {"step": "1"})
    if damage == "missing":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"no tensors", "cut": whole[:-4]}[damage])
    with pytest.raises(CheckpointError, match=r"\.safetensors: not a whole checkpoint: .*delete"):
        load_state(path)


def test_prefixes_are_put_on_and_taken_off():
    state = prefixed("model|", {"a": torch.zeros(1)}) | prefixed("m", {"a": torch.ones(1)})
    assert set(state) == {"model|a", "ma"}
    assert under("model|", state) == {"a": state["model|a"]}
    assert set(under("m", state)) == {"odel|a", "a"}


def test_shapes_have_to_agree_name_by_name():
    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    require_shapes(Path("x"), {"b": torch.ones(4), "a": torch.ones(2, 3)}, expected, "start anew")
    for state, complaint in (
        ({"a": torch.zeros(2, 3)}, r"'b' has shape None, expected \(4,\)"),
        (expected | {"c": torch.zeros(())}, r"'c' has shape \(\), expected None"),
        (expected | {"a": torch.zeros(3, 2)}, r"'a' has shape \(3, 2\), expected \(2, 3\)"),
    ):
        with pytest.raises(CheckpointError, match=f"^x: tensor {complaint}; start anew$"):
            require_shapes(Path("x"), state, expected, "start anew")
