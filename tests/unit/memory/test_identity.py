from __future__ import annotations

from dataclasses import replace

import pytest

from megacontext.errors import ConfigError


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_size": 1}, "block_size is 1"),
        ({"block_size": 65536}, "block_size is 65536"),
        ({"gist_width": 0}, "gist_width is 0"),
        ({"key_width": -1}, "key_width is -1"),
        ({"gist_dtype": "fp32"}, "fp32"),
        ({"base_model": "a\0b"}, "base_model"),
    ],
)
def test_values_out_of_range_are_refused(identity, change, named):
    with pytest.raises(ConfigError, match=named):
        replace(identity, **change)


def test_equal_identities_have_no_difference(identity):
    assert identity.explain_difference(replace(identity)) is None
