"""The strategy and the monitor for projects that say ``import lightning_fabric``.

The modules are those of :mod:`lightning_adpsgd.fabric`, loaded a second time with the names in ``.family``.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__path__ = [*__path__, str(Path(__file__).parents[1] / "fabric")]

import_module("lightning_fabric")  # first, because the strategies' names are registered as soon as it is there

if TYPE_CHECKING:  # what a type checker can know: the base classes of this family
    from typing import Any

    from lightning_fabric.strategies.ddp import DDPStrategy

    from lightning_adpsgd.history import RoundHistory

    class ADPSGDStrategy(DDPStrategy):
        """See :class:`lightning_adpsgd.fabric.ADPSGDStrategy`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
        @classmethod
        def int4(cls, **overrides: Any) -> "ADPSGDStrategy":
            """Make what ``strategy="adpsgd_int4"`` stands for."""

    class CommunicationMonitor(RoundHistory):
        """See :class:`lightning_adpsgd.fabric.CommunicationMonitor`."""

else:
    from .monitor import CommunicationMonitor
    from .strategy import ADPSGDStrategy

__all__ = ["ADPSGDStrategy", "CommunicationMonitor"]
