"""DDP with a communication hook, on any device."""

from collections.abc import Callable
from typing import Any

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
