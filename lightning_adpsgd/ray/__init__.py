"""The door to Ray Train: the strategy, with Ray's classes.

It is of the family of Lightning's classes that Ray's own are derived from: ``lightning.pytorch`` if `lightning` is
installed, otherwise ``pytorch_lightning``.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_adpsgd.ray.strategy import RayADPSGDStrategy
else:
    from .strategy import RayADPSGDStrategy

__all__ = ["RayADPSGDStrategy"]
