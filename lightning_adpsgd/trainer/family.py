"""Every name of Lightning that this package uses, as ``lightning.pytorch`` has it.

The classes of ``lightning`` and of ``pytorch_lightning`` look alike and cannot be mixed. The modules beside this one
take them all from here, so that :mod:`lightning_adpsgd.pytorch_lightning` can load the same modules with the others.
"""

from lightning import pytorch as pl
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.overrides import distributed as ddp_overrides
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.io import AsyncCheckpointIO, async_plugin
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException

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
