from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_base_model

from megacontext.errors import CheckpointError
from megacontext.gistnet import GistNet, GistNetConfig
from megacontext.runtime.base_model import BaseModel
from megacontext.runtime.companions import bundled_gistnet, load_gistnet, require_fit


def kv_net(base, **changes):
    values = {
        "kind": "transformer",
        "d_model": base.d_model,
        "n_heads": 2,
        "reader": "kv",
        "slots": 2,
        "kv_layers": base.n_layers,
        "kv_heads": base.n_kv_heads,
        "kv_head_dim": base.head_dim,
    }
    return GistNet(GistNetConfig(**(values | changes)))


def test_a_model_of_ones_own_has_the_mean_by_default():
    base = tiny_base_model()
    for name in (None, "mean"):
        net = load_gistnet(name, base, "some/folder")
        assert (net.config.kind, net.config.d_model) == ("mean", base.d_model)


def test_a_checkpoint_is_loaded_in_float32(tmp_path):
    base = tiny_base_model()
    kv_net(base).half().save_pretrained(tmp_path / "net")
    net = load_gistnet(str(tmp_path / "net"), base, "some/folder")
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert net.cost == 2


def test_one_made_for_another_base_is_refused(tmp_path):
    base = tiny_base_model()
    kv_net(base, kv_layers=base.n_layers + 1).save_pretrained(tmp_path / "net")
    with pytest.raises(CheckpointError, match="was made for a base with"):
        load_gistnet(str(tmp_path / "net"), base, "some/folder")
    with pytest.raises(CheckpointError, match="train one for"):
        require_fit(GistNet.untrained(base.d_model * 2), base)
    kv_net(base, feature_layers=base.n_layers + 1).save_pretrained(tmp_path / "deep")
    with pytest.raises(CheckpointError, match="feature_layers is 4, tiny-qwen3 has 3 layers"):
        load_gistnet(str(tmp_path / "deep"), base, "some/folder")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_gistnet(str(tmp_path / "none"), tiny_base_model(), "some/folder")


def test_the_bundled_one_is_loaded_by_that_name():
    base = BaseModel.from_pretrained("bundled:tiny")
    net = load_gistnet("bundled", base, "bundled:tiny")
    assert net.config.kind == "transformer"
    assert net.config.d_model == base.d_model
    assert load_gistnet(None, base, "bundled:tiny").config.kind == "mean"
    with pytest.raises(CheckpointError, match="no GistNet is shipped with some/folder"):
        load_gistnet("bundled", base, "some/folder")


def test_only_bundled_models_bring_a_gistnet():
    assert bundled_gistnet("owner/model") is None
    assert bundled_gistnet("bundled:none") is None
