"""Focus policies by the names that configurations give them."""

from __future__ import annotations

from typing import Literal

from megacontext.errors import ConfigError
from megacontext.lensnet import LensNet
from megacontext.memory import KeyIndexConfig
from megacontext.runtime.focus_policies import (
    AttentionPolicy,
    FocusPolicy,
    LexicalPolicy,
    RecencyPolicy,
)
from megacontext.runtime.lens_policy import LensPolicy
from megacontext.runtime.likelihood_policy import LikelihoodPolicy

PolicyName = Literal["auto", "recency", "lexical", "likelihood", "attention", "lens"]


def make_policy(
    name: PolicyName, lens: LensNet | None, key_index: KeyIndexConfig | None = None
) -> FocusPolicy:
    """A new policy.

    Args:
        name: of the policy; ``auto``: ``lens`` where there is a LensNet, else ``lexical``.
        lens: the LensNet, if there is one.
        key_index: how its keys are searched once they are many.

    Raises:
        ConfigError: policy ``lens`` without a LensNet.
    """
    if name == "auto":
        name = "lexical" if lens is None else "lens"
    match name:
        case "recency":
            return RecencyPolicy()
        case "lexical":
            return LexicalPolicy()
        case "likelihood":
            return LikelihoodPolicy()
        case "attention":
            return AttentionPolicy()
        case "lens":
            if lens is None:
                raise ConfigError("policy 'lens' needs a LensNet; name a checkpoint")
            return LensPolicy(lens, key_index=key_index)
