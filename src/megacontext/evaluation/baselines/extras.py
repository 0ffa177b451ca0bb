"""Rivals whose libraries are optional."""

from __future__ import annotations

import importlib
from typing import Any

from megacontext.errors import ConfigError


def import_extra(module: str, *, rival: str, extra: str) -> Any:
    """A module of an optional extra.

    Raises:
        ConfigError: it cannot be imported; names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"rival {rival!r}: cannot import {module} ({error}); run "
            f"`pip install 'megacontext[{extra}]'`"
        ) from None
