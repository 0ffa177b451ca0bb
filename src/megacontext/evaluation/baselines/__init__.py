"""What a user would pick instead, at equal budget, behind one interface."""

from megacontext.evaluation.baselines.config import RivalsConfig
from megacontext.evaluation.baselines.factory import RIVALS, rivals
from megacontext.evaluation.baselines.rival import Informed, Rival, Span
from megacontext.evaluation.baselines.sliding_window import SlidingWindow

__all__ = [
    "RIVALS",
    "Informed",
    "Rival",
    "RivalsConfig",
    "SlidingWindow",
    "Span",
    "rivals",
]
