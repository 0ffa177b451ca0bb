"""MegaContext: a memory without end for any frozen causal language model.

>>> from megacontext import Session, SessionConfig
>>> session = Session(SessionConfig(model="bundled:tiny"))
>>> import tempfile, pathlib
>>> folder = tempfile.TemporaryDirectory()
>>> engine = session.create(pathlib.Path(folder.name) / "notes.mctx")
>>> engine.ingest("The secret code of the rusty lantern is 48213. " * 3).end > 32
True
>>> engine.memory.close()
>>> folder.cleanup()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megacontext.errors import MegaContextError as MegaContextError
    from megacontext.gistnet import GistNet as GistNet
    from megacontext.lensnet import LensNet as LensNet
    from megacontext.memory import Memory as Memory
    from megacontext.memory import Source as Source
    from megacontext.runtime import BaseModel as BaseModel
    from megacontext.runtime import Engine as Engine
    from megacontext.runtime import EngineConfig as EngineConfig
    from megacontext.runtime import Session as Session
    from megacontext.runtime import SessionConfig as SessionConfig

__version__ = "0.1.0"

# Loaded when first used, so that `megacontext --help` need not wait for torch.
_HOMES = {
    "BaseModel": "megacontext.runtime",
    "Engine": "megacontext.runtime",
    "EngineConfig": "megacontext.runtime",
    "GistNet": "megacontext.gistnet",
    "LensNet": "megacontext.lensnet",
    "MegaContextError": "megacontext.errors",
    "Memory": "megacontext.memory",
    "Session": "megacontext.runtime",
    "SessionConfig": "megacontext.runtime",
    "Source": "megacontext.memory",
}

__all__ = [
    "BaseModel",
    "Engine",
    "EngineConfig",
    "GistNet",
    "LensNet",
    "MegaContextError",
    "Memory",
    "Session",
    "SessionConfig",
    "Source",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'megacontext' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
