"""Notices every optimizer step, even one that bypasses the training framework."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_hooks: dict[int, RemovableHandle] = {}
"""By the optimizer's id, since optimizers may be equal or unhashable: it is watched by whoever has asked last."""


class StepWatch:
    """Calls ``on_step`` once per step of the optimizers that it watches.

    Args:
        on_step: called with the optimizer, after its step.
    """

    def __init__(self, on_step: Callable[[Optimizer], object]) -> None:
        self._on_step = on_step
        self._own: list[tuple[Optimizer, RemovableHandle]] = []
        self._stepping = 0  # how many steps of the framework are nested in each other

    def watch(self, optimizer: Optimizer) -> None:
        """Notice the optimizer's steps until :meth:`stop`, or until another watch asks for it."""
        if (former := _hooks.pop(id(optimizer), None)) is not None:
            former.remove()
        with suppress(AttributeError):  # a wrapper may not have called Optimizer.__init__
            hook = optimizer.register_step_post_hook(self._on_unseen_step)
            _hooks[id(optimizer)] = hook
            self._own.append((optimizer, hook))

    @contextmanager
    def stepping(self, optimizer: Optimizer) -> Iterator[None]:
        """The framework steps the optimizer: one step, whatever is called inside, and even if there is no hook."""
        self._stepping += 1
        try:
            yield
        finally:
            self._stepping -= 1
        self._on_step(optimizer)

    def stop(self) -> None:
        """Watch no optimizer any more."""
        for optimizer, hook in self._own:
            hook.remove()
            if _hooks.get(id(optimizer)) is hook:
                del _hooks[id(optimizer)]
        self._own.clear()

    def _on_unseen_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._stepping:
            self._on_step(optimizer)
