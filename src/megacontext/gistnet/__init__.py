"""GistNet: the compressor of the gist tree, and the readers of its gists (pure torch)."""

from megacontext.gistnet.config import GistNetConfig
from megacontext.gistnet.model import GistNet, Gists

__all__ = ["GistNet", "GistNetConfig", "Gists"]
