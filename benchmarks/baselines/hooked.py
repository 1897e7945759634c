"""DDP with a communication hook, on any device; and one whose hook counts what it sends."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override


class HookedDDP(DDPStrategy):
    """DDP with a communication hook, on any device; Lightning registers none on a CPU.

    Args:
        hook: PyTorch's function that reduces a bucket of gradients.
        new_state: makes its state, once processes are connected.
        options: of ``DDPStrategy``.

    Raises:
        ValueError: if the options hold another hook.
    """

    def __init__(self, hook: Callable[..., Any], new_state: Callable[[], Any], **options: Any) -> None:
        if options.get("ddp_comm_hook") is not None:
            raise ValueError(
                f"{type(self).__name__}(ddp_comm_hook={options['ddp_comm_hook']!r}): expected None, because this"
                " strategy registers its own hook and DDP takes only one. Leave it out, or use DDPStrategy."
            )
        super().__init__(**options)
        self._hook = hook
        self._new_state = new_state

    @override
    def configure_ddp(self) -> None:
        """Register the hook."""
        super().configure_ddp()
        assert isinstance(self.model, DistributedDataParallel)
        self.model.register_comm_hook(self._new_state(), self._hook)


class Reducer(Protocol):
    """Averages gradients, and counts."""

    @property
    def steps(self) -> int:
        """How often all gradients were averaged."""

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent of them to others."""

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP's communication hook."""


class CountedDDP(HookedDDP):
    """DDP whose gradients a reducer averages.

    Args:
        reducer: what averages them.
        options: of ``DDPStrategy``.
    """

    def __init__(self, reducer: Reducer, **options: Any) -> None:
        self._reducer = reducer
        super().__init__(type(reducer).reduce, self._get_reducer, **options)

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent of gradients to other ranks since the start; DDP's own broadcasts are not in it."""
        return self._reducer.sent_bytes

    @property
    def steps(self) -> int:
        """How often all gradients were averaged since the start."""
        return self._reducer.steps

    def _get_reducer(self) -> Reducer:
        return self._reducer  # a method, not a lambda: start_method="spawn" pickles strategies
