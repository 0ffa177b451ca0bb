"""What is measured, against whom, and on which texts."""

from megacontext.evaluation.babi import BabiQuestion, read_babi
from megacontext.evaluation.demo import Demo, DemoConfig, DemoResult
from megacontext.evaluation.metrics import Estimate, mean, proportion
from megacontext.evaluation.sliding_window import SlidingWindow

__all__ = [
    "BabiQuestion",
    "Demo",
    "DemoConfig",
    "DemoResult",
    "Estimate",
    "SlidingWindow",
    "mean",
    "proportion",
    "read_babi",
]
