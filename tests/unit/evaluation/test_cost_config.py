from __future__ import annotations

import pytest

from megacontext.errors import ConfigError
from megacontext.evaluation.cost_config import CostSuiteConfig


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"lengths": [10_000]}, "lengths"),
        ({"lengths": [20_000, 10_000]}, "shortest first"),
        ({"lengths": [10_000, 10_000]}, "each once"),
        ({"lengths": [2_000, 10_000]}, "twice as long"),
        ({"prefill_batches": []}, "prefill_batches"),
        ({"prefill_batches": [4, 0]}, "prefill_batches"),
        ({"repeats": 1}, "repeats"),
        ({"blocks": 1}, "blocks"),
    ],
)
def test_what_cannot_be_measured_is_refused(settings, complaint):
    with pytest.raises(ConfigError, match=complaint):
        CostSuiteConfig.parse(settings)


def test_the_session_has_what_the_suite_names():
    config = CostSuiteConfig.parse(
        {"lens": "none", "engine": {"kv": "incremental"}, "key_index": {"flat_keys": 50_000}}
    )
    assert config.session.lens == "none"
    assert config.session.engine.kv == "incremental"
    assert config.session.key_index.flat_keys == 50_000
