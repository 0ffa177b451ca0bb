"""Training data, objectives and loops."""

from megacontext.training.lm_batches import MixtureConfig
from megacontext.training.optimizers import OptimizerConfig
from megacontext.training.train_base import ArchitectureConfig, BaseTrainer, TrainBaseConfig

__all__ = [
    "ArchitectureConfig",
    "BaseTrainer",
    "MixtureConfig",
    "OptimizerConfig",
    "TrainBaseConfig",
]
