"""The strategy, the callback and the command line for projects that say ``import pytorch_lightning``.

Their classes cannot be mixed with those of ``lightning.pytorch``, so the modules of :mod:`lightning_adpsgd.trainer` are
loaded a second time as modules of this package: all of them take Lightning's names from ``.family``, which is found
here, and each other from the same package.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

__path__ = [*__path__, str(Path(__file__).parents[1] / "trainer")]

import_module("pytorch_lightning")  # first, because the strategies' names are registered as soon as it is there

if TYPE_CHECKING:  # what a type checker can know: the base classes of this family
    from typing import Any

    from pytorch_lightning.callbacks import Callback
    from pytorch_lightning.strategies.ddp import DDPStrategy

    from lightning_adpsgd.history import RoundHistory

    class ADPSGDStrategy(DDPStrategy):
        """See :class:`lightning_adpsgd.ADPSGDStrategy`."""

        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
        @classmethod
        def int4(cls, **overrides: Any) -> "ADPSGDStrategy":
            """Make what ``strategy="adpsgd_int4"`` stands for."""

    class CommunicationMonitor(RoundHistory, Callback):
        """See :class:`lightning_adpsgd.CommunicationMonitor`."""

        def __init__(self, prefix: str = "adpsgd", plot: bool = False, progress_bar: bool = False) -> None: ...

else:
    from .monitor import CommunicationMonitor
    from .strategy import ADPSGDStrategy

__all__ = ["ADPSGDStrategy", "CommunicationMonitor"]
