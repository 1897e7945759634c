"""What a worker that joins receives from a healthy one: weights, buffers, optimizer state, and the user's own state."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Stateful(Protocol):
    """An object whose state is sent to a worker that joins, such as a learning-rate scheduler."""

    def state_dict(self) -> Any:
        """Its state."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Restore it."""


class JoinableState(Protocol):
    """All state of a worker that a round does not average: that of a healthy one is restored by one that joins."""

    def take(self) -> Any:
        """The state now; its tensors need not be copied."""

    def restore(self, state: Any) -> None:
        """Continue from another worker's state. Parameters and buffers keep their storage."""


class WorkerState:
    """Takes and restores all state of one worker that a round does not average.

    Args:
        optimizer: the optimizer.
        module: the module; None: only the optimizer's parameters are sent.
        stateful: further objects, by name; the same names on all workers.
    """

    def __init__(self, optimizer: Optimizer, module: nn.Module | None, stateful: Mapping[str, Stateful]) -> None:
        self._optimizer = optimizer
        self._module = module
        self._stateful = dict(stateful)

    def take(self) -> dict[str, Any]:
        """The state now; tensors are not copied."""
        module = None if self._module is None else dict(self._module.state_dict())
        return {
            "parameters": [parameter.detach() for parameter in self._parameters()],
            "module": module,
            "optimizer": self._optimizer.state_dict(),
            "stateful": {name: each.state_dict() for name, each in self._stateful.items()},
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from another worker's state. Parameters and buffers keep their storage."""
        if self._module is not None and state["module"] is not None:
            self._module.load_state_dict(state["module"])
        for mine, theirs in zip(self._parameters(), state["parameters"], strict=True):
            mine.copy_(theirs)
        self._optimizer.load_state_dict(state["optimizer"])
        for name, each in self._stateful.items():
            each.load_state_dict(state["stateful"][name])

    def _parameters(self) -> list[Tensor]:
        """Parameters that are not in the module's state."""
        known = set() if self._module is None else set(map(id, self._module.parameters()))
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        return [parameter for parameter in parameters if id(parameter) not in known]
