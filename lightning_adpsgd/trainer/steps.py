"""Counts optimizer steps, and finds the step at which to log a round."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adpsgd.rounds.record import AveragingRound
from lightning_adpsgd.step_watch import StepWatch

from .compat import step_of_the_loss, trainer_of
from .family import MisconfigurationException, pl
from .weights import AveragedWeights

_LATEST_STEPS = 16  # whose logged step is remembered, in addition to those of a round in flight


class CountedSteps(AveragedWeights):
    """Reports every optimizer step to the session, even if it bypasses Lightning."""

    def __init__(self, **launching: Any) -> None:
        super().__init__(**launching)
        self._step_watch = StepWatch(self._count_step)
        self._logged_steps: dict[int, deque[tuple[int, int]]] = {}  # of each optimizer's latest steps

    @override
    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: "pl.LightningModule | Module | None" = None,
        **kwargs: Any,
    ) -> Any:
        """Step the optimizer, then count the step, which averages if the period is over."""
        with self._step_watch.stepping(optimizer):
            return super().optimizer_step(optimizer, closure, model, **kwargs)

    def logged_step(self, round_: AveragingRound) -> int:
        """The step at which to log a round of this fit: the one at which Lightning logs that batch's loss.

        It counts batches that led to a step, while ``trainer.global_step`` counts the steps of all optimizers. The
        record of a round that the period asks for may come some steps after the round.
        """
        if round_.trigger == "period":
            for step, logged_step in self._logged_steps.get(round_.optimizer, ()):
                if step == round_.step:
                    return logged_step
        trainer = trainer_of(self.lightning_module)
        return round_.step if trainer is None else step_of_the_loss(trainer)

    def _watch_steps(self, optimizers: Iterable[Optimizer]) -> None:
        """Count steps that bypass Lightning too, for example by ``self.optimizers(use_pl_optimizer=False)``."""
        self._logged_steps = {}
        for optimizer in optimizers:
            self._step_watch.watch(optimizer)

    def _count_step(self, optimizer: Optimizer) -> None:
        self._second_weights_moved = True
        local_sgd = None if self._session is None else self._session.of(optimizer)
        if self._session is not None and local_sgd is not None:
            trainer = trainer_of(self.lightning_module)
            if trainer is not None:
                if local_sgd.index not in self._logged_steps:
                    self._logged_steps[local_sgd.index] = deque(maxlen=local_sgd.options.overlap + _LATEST_STEPS)
                self._logged_steps[local_sgd.index].append((local_sgd.steps + 1, step_of_the_loss(trainer)))
            self._session.step(local_sgd)
        elif optimizer.param_groups:
            raise MisconfigurationException(
                f"A {type(optimizer).__name__} was stepped that is none of the optimizers that configure_optimizers()"
                f" had returned when fit began. {type(self).__name__} counts each optimizer's local steps: return all"
                " optimizers from configure_optimizers(), and change them in place (add_param_group) instead of"
                " replacing them."
            )
