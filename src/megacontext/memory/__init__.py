"""Gist trees on disk: tokens, gists, lens keys, sources and a lexical index, committed together."""

from megacontext.memory.identity import MemoryIdentity, Source, SourcePart, SourceRecord
from megacontext.memory.key_index import KeyIndex, KeyIndexConfig
from megacontext.memory.tree import Memory
from megacontext.memory.verify import VerifyReport

__all__ = [
    "KeyIndex",
    "KeyIndexConfig",
    "Memory",
    "MemoryIdentity",
    "Source",
    "SourcePart",
    "SourceRecord",
    "VerifyReport",
]
