"""The strategy for Ray Train, where Ray starts and connects the workers."""

import inspect
from typing import TYPE_CHECKING, Any

from lightning_adpsgd.ray.bases import find_bases

if TYPE_CHECKING:
    from lightning_adpsgd.trainer.family import DDPStrategy as RayDDPStrategy
    from lightning_adpsgd.trainer.strategy import ADPSGDStrategy
else:
    RayDDPStrategy, ADPSGDStrategy = find_bases()

_SET_IN_RAY = {
    "process_group_backend": "ray.train.torch.TorchConfig(backend=...)",
    "timeout": "ray.train.torch.TorchConfig(timeout_s=...)",
    "start_method": "ray.train.ScalingConfig(num_workers=...)",
}


class RayADPSGDStrategy(ADPSGDStrategy, RayDDPStrategy):
    """:class:`~lightning_adpsgd.ADPSGDStrategy` in place of ``ray.train.lightning.RayDDPStrategy``.

    Like Ray's own class, it needs ``ray.train.lightning.RayLightningEnvironment()`` among the Trainer's plugins, and
    its Trainer goes through ``ray.train.lightning.prepare_trainer``.

    Args:
        args: as for :class:`~lightning_adpsgd.ADPSGDStrategy`.
        settings: the same, by name; without ``process_group_backend``, ``timeout`` and ``start_method``, because Ray
            starts and connects the workers: see ``ray.train.torch.TorchConfig``.

    Raises:
        TypeError: if an argument is of the wrong type.
        ValueError: if an argument is out of range, or is to be set in Ray.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        signature = inspect.signature(ADPSGDStrategy)
        given = signature.bind(*args, **settings).arguments
        for name, in_ray in _SET_IN_RAY.items():
            if given.get(name, signature.parameters[name].default) != signature.parameters[name].default:
                raise ValueError(
                    f"{name}={given[name]!r}: Ray starts and connects the workers. Leave {name} out, and use {in_ray}."
                )
