"""Every name of Fabric that this package uses, as ``lightning.fabric`` has it: see ``trainer/family.py``."""

from lightning.fabric import Fabric
from lightning.fabric.accelerators.accelerator import Accelerator
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

__all__ = [
    "STRATEGY_REGISTRY",
    "Accelerator",
    "CheckpointIO",
    "ClusterEnvironment",
    "DDPStrategy",
    "Fabric",
    "MisconfigurationException",
    "Precision",
    "rank_zero_info",
    "rank_zero_warn",
]
