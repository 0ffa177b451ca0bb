"""Checkpoints of both networks share one module; GistNet stands for both here."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megacontext.errors import CheckpointError
from megacontext.gistnet import GistNet, GistNetConfig

D, K = 16, 4


@pytest.fixture
def net():
    config = GistNetConfig(
        kind="transformer",
        d_model=D,
        block_size=K,
        n_heads=2,
        context_tokens=8,
        reader="kv",
        slots=2,
        kv_layers=2,
        kv_heads=1,
        kv_head_dim=4,
        init_seed=3,
    )
    return GistNet(config)


@pytest.fixture
def folder(net, tmp_path):
    net.save_pretrained(tmp_path / "gistnet")
    return tmp_path / "gistnet"


@torch.no_grad()
def test_round_trip_is_bit_identical(net, folder):
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter))
    net.save_pretrained(folder)
    loaded = GistNet.from_pretrained(folder)
    assert loaded.config == net.config
    assert loaded.version == net.version
    assert not loaded.training
    assert net.state_dict().keys() == loaded.state_dict().keys()
    for name, value in net.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    children = torch.randn(3, K, D)
    assert torch.equal(loaded.encode(children, 1).vectors, net.encode(children, 1).vectors)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_loaded_weights_can_be_trained(folder):
    assert all(
        parameter.requires_grad for parameter in GistNet.from_pretrained(folder).parameters()
    )


def test_a_gistnet_without_parameters_has_a_checkpoint_too(tmp_path):
    net = GistNet.untrained(D)
    net.save_pretrained(tmp_path)
    assert GistNet.from_pretrained(tmp_path).version == net.version


def test_types_are_kept_or_cast(net, tmp_path):
    net.bfloat16().save_pretrained(tmp_path)
    assert GistNet.from_pretrained(tmp_path).version == net.version
    loaded = GistNet.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_version_follows_weights_and_config(net):
    before = net.version
    assert len(before) == 16
    with torch.no_grad():
        net.encoder.out.weight[0, 0] += 1e-6
    assert net.version != before
    assert GistNet.untrained(16).version != GistNet.untrained(32).version


def test_version_is_the_same_in_every_release():
    """A stored memory is bound to this hash: it may only change with a new file format."""
    assert GistNet.untrained(256).version == "558b5127f3402603"


def test_a_checkpoint_from_before_features_keeps_its_version(net, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("feature_layers") == 0
    config.pop("feature_segment")
    path.write_text(json.dumps(config))
    assert GistNet.from_pretrained(folder).version == net.version
    path.write_text(json.dumps(config | {"feature_layers": 1}))
    assert GistNet.from_pretrained(folder).version != net.version


def test_loading_leaves_random_state_alone(folder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    GistNet.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), state)


def test_loaded_weights_do_not_depend_on_the_file(folder):
    net = GistNet.from_pretrained(folder)
    version = net.version
    (folder / "model.safetensors").write_bytes(b"")
    assert net.version == version


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: no such file"):
        GistNet.from_pretrained(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        GistNet.from_pretrained(tmp_path / "nothing")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a whole safetensors"):
        GistNet.from_pretrained(folder)


def change_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({"encoder.out.weight": torch.zeros(16, 15)}),
            r"'encoder\.out\.weight' has shape \(16, 15\), expected \(16, 16\)",
        ),
        (lambda t: t.pop("encoder.out.weight"), r"'encoder\.out\.weight' \(16, 16\) is missing"),
        (lambda t: t.update(extra=torch.zeros(2)), r"'extra' \(2,\) is not part"),
        (
            lambda t: t.update({"encoder.out.weight": torch.zeros(16, 16).half()}),
            "expected one floating type",
        ),
    ],
)
def test_wrong_tensors(folder, change, message):
    change_weights(folder, change)
    with pytest.raises(CheckpointError, match=message):
        GistNet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"slots": 99}, "'slots' has value 99"),
        ({"model_type": "bert"}, "model_type is 'bert', expected 'megacontext-gistnet'"),
        ({"d_model": 32, "gist_width": 32}, "has shape"),
    ],
)
def test_wrong_config(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        GistNet.from_pretrained(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{", '"text"'])
def test_config_is_not_json(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        GistNet.from_pretrained(folder)


def test_unwritable_folder(net, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        net.save_pretrained(tmp_path / "file")
