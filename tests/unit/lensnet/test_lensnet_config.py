import pytest

from megacontext.errors import ConfigError
from megacontext.lensnet import N_FEATURES, LensNetConfig


def test_gist_width_follows_d_model():
    assert LensNetConfig(d_model=64).gist_width == 64
    assert LensNetConfig(d_model=64, gist_width=128).gist_width == 128


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 64, "n_heads": 3}, "must divide d_hidden"),
        ({"d_model": 64, "n_features": N_FEATURES + 1}, "describes a span by"),
        ({"d_model": 64, "key_width": 4}, "key_width"),
        ({"d_model": 64, "interaction": "sum"}, "interaction"),
        ({"d_model": 64, "typo": 1}, "unknown key"),
        ({"key_width": 64}, "'d_model' is missing"),
    ],
)
def test_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        LensNetConfig.parse(values)
