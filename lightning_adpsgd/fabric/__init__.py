"""The door to Fabric: the strategy and the monitor, with the classes of ``lightning.fabric``."""

from importlib import import_module
from typing import TYPE_CHECKING

import_module("lightning.fabric")  # first, because the strategies' names are registered as soon as it is there

if TYPE_CHECKING:
    from lightning_adpsgd.fabric.monitor import CommunicationMonitor
    from lightning_adpsgd.fabric.strategy import ADPSGDStrategy
else:
    from .monitor import CommunicationMonitor
    from .strategy import ADPSGDStrategy

__all__ = ["ADPSGDStrategy", "CommunicationMonitor"]
