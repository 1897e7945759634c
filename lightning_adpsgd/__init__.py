"""Adaptive periodic parameter averaging (ADPSGD, arXiv:2007.06134) for PyTorch Lightning.

Importing this package registers the strategy names "adpsgd", "adpsgd_spawn", "adpsgd_fork", "adpsgd_notebook" and the
alias "adaptive_local_sgd", so that ``Trainer(strategy="adpsgd")`` works.
"""

from lightning_adpsgd.averaging import AveragingRound, NodeWorkers, Workers
from lightning_adpsgd.errors import WorkerLostError, WorkersDisagreeError, WorkersDivergedError
from lightning_adpsgd.local_sgd import LocalSGD
from lightning_adpsgd.monitor import CommunicationMonitor
from lightning_adpsgd.periods import AdaptivePeriod, AveragingPeriod, ConstantPeriod
from lightning_adpsgd.strategy import ADPSGDStrategy

__all__ = [
    "ADPSGDStrategy",
    "AdaptivePeriod",
    "AveragingPeriod",
    "AveragingRound",
    "CommunicationMonitor",
    "ConstantPeriod",
    "LocalSGD",
    "NodeWorkers",
    "WorkerLostError",
    "Workers",
    "WorkersDisagreeError",
    "WorkersDivergedError",
]
__version__ = "0.1.0"

ADPSGDStrategy.register_strategies()
