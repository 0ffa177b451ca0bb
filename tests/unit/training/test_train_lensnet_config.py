from __future__ import annotations

import pytest
from tiny_training import tiny_lens_config

from megacontext.errors import ConfigError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": []}, "'rounds'"),
        ({"rounds": [{"sessions": 0}]}, r"'rounds\.0\.sessions' has value 0"),
        ({"scores": {"held_out_share": 1.0}}, "'scores.held_out_share' has value 1.0"),
        ({"keys": {"steps": -1}}, "'keys.steps' has value -1"),
        ({"corpus": []}, "'corpus'"),
        ({"lr": 1}, "unknown key 'lr'"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_lens_config(tmp_path, **changes)
