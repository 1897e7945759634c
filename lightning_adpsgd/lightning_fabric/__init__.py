"""The strategy and the monitor for projects that say ``import lightning_fabric``.

The modules are those of :mod:`lightning_adpsgd.fabric`, loaded a second time with the names in ``.family``.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__path__ = [*__path__, str(Path(__file__).parents[1] / "fabric")]

import_module("lightning_fabric")  # first, because the strategies' names are registered as soon as it is there

if TYPE_CHECKING:
    from lightning_adpsgd.fabric.monitor import CommunicationMonitor
    from lightning_adpsgd.fabric.strategy import ADPSGDStrategy
else:
    from .monitor import CommunicationMonitor
    from .strategy import ADPSGDStrategy

__all__ = ["ADPSGDStrategy", "CommunicationMonitor"]
