"""Notices every optimizer step, even one that bypasses the training framework."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

_hooks: "weakref.WeakKeyDictionary[Optimizer, RemovableHandle]" = weakref.WeakKeyDictionary()
"""One per optimizer: it is watched by whoever has asked for it last."""


class StepWatch:
    """Calls ``on_step`` once per step of the optimizers that it watches.

    Args:
        on_step: called with the optimizer, after its step.
    """

    def __init__(self, on_step: Callable[[Optimizer], object]) -> None:
        self._on_step = on_step
        self._own: list[tuple[Optimizer, RemovableHandle]] = []
        self._stepping = False

    def watch(self, optimizer: Optimizer) -> None:
        """Notice the optimizer's steps until :meth:`stop`, or until another watch asks for it."""
        if (former := _hooks.pop(optimizer, None)) is not None:
            former.remove()
        with suppress(AttributeError):  # a wrapper may not have called Optimizer.__init__
            _hooks[optimizer] = optimizer.register_step_post_hook(self._on_unseen_step)
            self._own.append((optimizer, _hooks[optimizer]))

    @contextmanager
    def stepping(self, optimizer: Optimizer) -> Iterator[None]:
        """The framework steps the optimizer: one step, whatever is called inside, and even if there is no hook."""
        self._stepping = True
        try:
            yield
        finally:
            self._stepping = False
        self._on_step(optimizer)

    def stop(self) -> None:
        """Watch no optimizer any more."""
        for optimizer, hook in self._own:
            hook.remove()
            if _hooks.get(optimizer) is hook:
                del _hooks[optimizer]
        self._own.clear()

    def _on_unseen_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._stepping:
            self._on_step(optimizer)
