"""Every private name of Fabric that this package uses, and why it does."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from .family import DDPStrategy


def leave_backward_alone(strategy: DDPStrategy) -> None:
    """Have ``fabric.no_backward_sync`` do nothing: what ``DDPStrategy`` has for it expects DDP's wrapper."""
    strategy._backward_sync_control = _NothingToSync()  # type: ignore[assignment]


class _NothingToSync:
    """No backward pass communicates."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[None]:
        return nullcontext()
