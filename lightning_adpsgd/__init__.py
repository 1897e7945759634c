"""Adaptive periodic parameter averaging (ADPSGD, arXiv:2007.06134) for PyTorch Lightning.

Importing this package registers the strategy names "adpsgd", "adpsgd_spawn", "adpsgd_fork", "adpsgd_notebook", the
same for "adpsgd_int4", and the alias "adaptive_local_sgd", for the ``Trainer(strategy="adpsgd")`` and the
``Fabric(strategy="adpsgd")`` of ``lightning`` and of ``pytorch_lightning`` (see :mod:`lightning_adpsgd.families`).
:class:`LocalSGD` works in a plain PyTorch loop, without Lightning.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lightning_adpsgd.families import register_strategies, room_of_the_family_in_use

if TYPE_CHECKING:
    from lightning_adpsgd.averaging.codec import Codec
    from lightning_adpsgd.averaging.int_codec import IntCodec
    from lightning_adpsgd.averaging.update import Update
    from lightning_adpsgd.errors import WorkerLostError, WorkersDisagreeError, WorkersDivergedError
    from lightning_adpsgd.local_sgd import LocalSGD
    from lightning_adpsgd.options import AveragingOptions
    from lightning_adpsgd.periods import AdaptivePeriod, AveragingPeriod, ConstantPeriod
    from lightning_adpsgd.rounds.record import AveragingRound
    from lightning_adpsgd.trainer.monitor import CommunicationMonitor
    from lightning_adpsgd.trainer.strategy import ADPSGDStrategy
    from lightning_adpsgd.workers.group import WorkerGroup
    from lightning_adpsgd.workers.nodes import NodeWorkerGroup

__all__ = [
    "ADPSGDStrategy",
    "AdaptivePeriod",
    "AveragingOptions",
    "AveragingPeriod",
    "AveragingRound",
    "Codec",
    "CommunicationMonitor",
    "ConstantPeriod",
    "IntCodec",
    "LocalSGD",
    "NodeWorkerGroup",
    "Update",
    "WorkerGroup",
    "WorkerLostError",
    "WorkersDisagreeError",
    "WorkersDivergedError",
]
__version__ = "0.2.0"

_MODULES = {
    "AdaptivePeriod": "periods",
    "AveragingOptions": "options",
    "AveragingPeriod": "periods",
    "AveragingRound": "rounds.record",
    "Codec": "averaging.codec",
    "ConstantPeriod": "periods",
    "IntCodec": "averaging.int_codec",
    "LocalSGD": "local_sgd",
    "NodeWorkerGroup": "workers.nodes",
    "Update": "averaging.update",
    "WorkerGroup": "workers.group",
    "WorkerLostError": "errors",
    "WorkersDisagreeError": "errors",
    "WorkersDivergedError": "errors",
}
"""Imported when they are first used: most import torch, which takes seconds, and the command line may do without."""
_NEED_LIGHTNING = {"ADPSGDStrategy": "strategy", "CommunicationMonitor": "monitor"}
_FORMER_NAMES = {"Workers": "WorkerGroup", "NodeWorkers": "NodeWorkerGroup"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        return found
    if name in _NEED_LIGHTNING:
        return getattr(importlib.import_module(f"{room_of_the_family_in_use()}.{_NEED_LIGHTNING[name]}"), name)
    if name in _FORMER_NAMES:
        from lightning_adpsgd.former_names import warn_of_former_name

        new = _FORMER_NAMES[name]
        warn_of_former_name(f"{__name__}.{name}", new)
        return __getattr__(new)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_strategies()
