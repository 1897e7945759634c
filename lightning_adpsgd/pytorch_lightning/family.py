"""Every name of Lightning that this package uses, as ``pytorch_lightning`` has it: see ``trainer/family.py``."""

import pytorch_lightning as pl
from lightning_fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.overrides import distributed as ddp_overrides
from pytorch_lightning.plugins import Precision
from pytorch_lightning.plugins.io import AsyncCheckpointIO, async_plugin
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry
from pytorch_lightning.trainer.states import TrainerFn, TrainerStatus
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from pytorch_lightning.utilities.exceptions import SIGTERMException

__all__ = [
    "AsyncCheckpointIO",
    "Callback",
    "CheckpointIO",
    "ClusterEnvironment",
    "DDPStrategy",
    "GradientAccumulationScheduler",
    "LightningCLI",
    "MisconfigurationException",
    "ModelCheckpoint",
    "ModelPruning",
    "Precision",
    "SIGTERMException",
    "StochasticWeightAveraging",
    "StrategyRegistry",
    "Timer",
    "TrainerFn",
    "TrainerStatus",
    "async_plugin",
    "ddp_overrides",
    "pl",
    "rank_zero_info",
    "rank_zero_only",
    "rank_zero_warn",
]
