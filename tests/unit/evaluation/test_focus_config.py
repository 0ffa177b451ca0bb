from __future__ import annotations

import pytest

from megacontext.config import load_config
from megacontext.errors import ConfigError
from megacontext.evaluation.focus_config import FocusSuiteConfig


def read(*overrides):
    return load_config(FocusSuiteConfig, None, overrides)


@pytest.mark.parametrize(
    ("written", "tokens"),
    [
        ("4k", (4_000,)),
        ("4k,32K, 1m", (4_000, 32_000, 1_000_000)),
        ("1234", (1_234,)),
        ("[4k, 500]", (4_000, 500)),
        ("4000,5000", (4_000, 5_000)),
    ],
)
def test_lengths_are_read_as_people_write_them(written, tokens):
    assert read(f"lengths={written}").lengths == tokens


def test_names_are_read_from_a_list_or_a_text():
    assert read("policies=lexical,oracle").policies == ("lexical", "oracle")
    assert read("kinds=[none, codes]").kinds == ("none", "codes")


@pytest.mark.parametrize(
    "override",
    ["lengths=4x", "lengths=0k", "lengths=", "lengths=4k,4000", "policies=best", "kinds=none,none"],
)
def test_what_is_no_length_or_name_is_refused(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        read(override)
