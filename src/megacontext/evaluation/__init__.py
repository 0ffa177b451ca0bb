"""What is measured, against whom, and on which texts."""

from megacontext.evaluation.babi import BabiQuestion, read_babi
from megacontext.evaluation.baselines import Rival, RivalsConfig, SlidingWindow, rivals
from megacontext.evaluation.demo import Demo, DemoConfig, DemoResult
from megacontext.evaluation.metrics import Estimate, mean, proportion

__all__ = [
    "BabiQuestion",
    "Demo",
    "DemoConfig",
    "DemoResult",
    "Estimate",
    "Rival",
    "RivalsConfig",
    "SlidingWindow",
    "mean",
    "proportion",
    "read_babi",
    "rivals",
]
