import pytest

from megacontext.errors import ConfigError
from megacontext.gistnet import GistNetConfig


def test_widths_follow_d_model():
    config = GistNetConfig(d_model=64, kv_head_dim=16)
    assert (config.gist_width, config.d_ff, config.kv_value_dim) == (64, 176, 16)
    assert GistNetConfig.parse(config.model_dump()) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 64, "gist_width": 96}, "1 to 4 times"),
        ({"d_model": 64, "gist_width": 320}, "1 to 4 times"),
        ({"d_model": 64, "gist_width": 128}, "kind 'mean'"),
        ({"kind": "transformer", "d_model": 60, "n_heads": 4}, "even widths"),
        ({"kind": "transformer", "d_model": 64, "context_tokens": 40}, "multiple of block_size"),
        ({"kind": "transformer", "d_model": 64, "context_tokens": 2048}, "context_tokens"),
        ({"d_model": 64, "reader": "kv"}, "kv_layers"),
        ({"d_model": 64, "slots": 9}, "slots"),
        ({"d_model": 64, "feature_layers": 1, "feature_segment": 40}, "feature_segment 40 must be"),
        ({"d_model": 64, "feature_layers": -1}, "feature_layers"),
        ({"d_model": 64, "typo": 1}, "unknown key 'typo'"),
        ({"gist_width": 64}, "key 'd_model' is missing"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        GistNetConfig.parse(values)


def test_segments_need_not_fit_blocks_where_there_are_none():
    config = GistNetConfig(d_model=64, block_size=24)
    assert (config.feature_layers, config.feature_segment) == (0, 256)


@pytest.mark.parametrize(("tokens", "layers"), [(256, 2), (96, 2), (32, 3), (0, 2), (1024, 5)])
def test_layer_windows_reach_exactly_the_context(tokens, layers):
    config = GistNetConfig(kind="transformer", d_model=64, context_tokens=tokens, n_layers=layers)
    assert len(config.layer_windows) == layers
    assert sum(config.layer_windows) * 32 == tokens
    assert max(config.layer_windows) - min(config.layer_windows) <= 1
