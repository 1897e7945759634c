"""Local steps and averaging rounds in place of gradient all-reduces, in a loop of one's own."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adpsgd.local_sgd import LocalSGD
from lightning_adpsgd.options import AveragingOptions
from lightning_adpsgd.periods import AveragingPeriod
from lightning_adpsgd.rounds.handshake import check_module, naming_lost_workers
from lightning_adpsgd.rounds.record import AveragingRound, Trigger
from lightning_adpsgd.session import TrainingSession
from lightning_adpsgd.step_watch import StepWatch
from lightning_adpsgd.validation import check_listener, check_total_steps
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.peers import closed_at_exit

from .compat import leave_backward_alone
from .family import DDPStrategy, MisconfigurationException, rank_zero_warn

ASSUMED_STEPS = 4000
"""K, for rules that need it, where nobody has said how long the run is: a quarter of it are 1,000 steps."""


class LocalSteps(DDPStrategy):
    """Leaves out DDP's wrapper, counts the steps of all optimizers, and averages when their periods are over.

    Args:
        period: the rule.
        options: of the rounds.
        total_steps: K, the steps that each optimizer will take; None if it is not known.
        launching: as for ``DDPStrategy``.
    """

    def __init__(
        self, period: AveragingPeriod, options: AveragingOptions, total_steps: int | None, **launching: Any
    ) -> None:
        super().__init__(**launching)
        # Configuration
        self._period = period
        self._options = options
        self._options.check_with(self._period)
        self._total_steps = check_total_steps(total_steps)
        leave_backward_alone(self)

        # State
        self._workers = WorkerGroup()
        self._modules: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._session: TrainingSession | None = None  # from the first step on
        self._listeners: list[Callable[[AveragingRound], None]] = []
        self._step_watch = StepWatch(self._count_step)
        self._has_stepped = False
        self._warned_of_no_optimizer = False
        self._buffers_after_round: list[tuple[int, int]] = []

    @property
    def session(self) -> TrainingSession | None:
        """All optimizers that were set up; None before the first step."""
        return self._session

    @property
    def local_sgd(self) -> list[LocalSGD]:
        """One per optimizer, in the order in which they were set up; none before the first step."""
        return [] if self._session is None else self._session.local_sgd

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that were set up."""
        return self._optimizers

    def set_total_steps(self, total_steps: int | None) -> None:
        """Say how long the run is, before its first step.

        Args:
            total_steps: K, the steps that each optimizer will take. Without it, rules take phases that are given as
                shares of the run (``AdaptivePeriod(sampling=0.25)``) as those of 4,000 steps, with a warning.

        Raises:
            TypeError: if it is neither an int nor None.
            ValueError: if it is negative.
            MisconfigurationException: if the first step was taken already.
        """
        if self._has_stepped:
            raise MisconfigurationException(
                f"set_total_steps({total_steps!r}) came after the first step, by which the phases of the averaging rule"
                " have begun. Call it between fabric.launch() and the loop."
            )
        self._total_steps = check_total_steps(total_steps)
        if self._session is not None:  # since a checkpoint was loaded
            self._set_up(self._session)

    def subscribe(self, listener: Callable[[AveragingRound], None]) -> None:
        """Have ``listener`` called, on every rank, with the record of each round."""
        self._listeners.append(check_listener(listener))
        if self._session is not None:
            self._session.subscribe(listener)

    def average(self, trigger: Trigger = "validation") -> bool:
        """Average what has been trained since the latest round, if anything has. All workers have to call it.

        Args:
            trigger: what for, as the records say it: "validation", "checkpoint" or "train_end".

        Returns:
            Whether there was a round.
        """
        if self._session is None:
            return False
        if self._any_worker(self._session, self._buffers() != self._buffers_after_round):
            self._session.note_forward()
        averaged = self._session.average(trigger)
        self._buffers_after_round = self._buffers()
        return averaged

    # Set up

    @override
    def setup_environment(self) -> None:
        with closed_at_exit():
            super().setup_environment()
        self._workers = WorkerGroup(device=self.root_device)

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:  # type: ignore[override]
        """No wrapper, hence no gradient all-reduce. All workers start from the first one's weights.

        The buffers of a module that is set up after the first step (to test with, for example) join no rounds.
        """
        if self._workers.size > 1:
            check_module(self._workers, module)
            with naming_lost_workers(self._workers, "the broadcast of a module's weights"):
                self._workers.broadcast_([*module.parameters(), *module.buffers()])
        if self._session is None:
            self._modules.append(module)
        return module

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        if any(optimizer is each for each in self._optimizers):
            return optimizer
        if self._session is not None:
            raise MisconfigurationException(
                f"An optimizer ({type(optimizer).__name__}) was set up after the first step. All workers have to know"
                " from the start what they average: set up all optimizers before the loop, and change them in place"
                " (add_param_group)."
            )
        self._optimizers.append(optimizer)
        self._step_watch.watch(optimizer)
        return optimizer

    # Steps

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        super().backward(tensor, module, *args, **kwargs)
        if not self._optimizers and self._modules and not self._warned_of_no_optimizer and self._workers.size > 1:
            self._warned_of_no_optimizer = True
            rank_zero_warn(
                "A backward pass was run, but no optimizer was set up: its steps are not counted, nothing is averaged,"
                " and each worker trains a model of its own. Pass it to fabric.setup(model, optimizer) or"
                " fabric.setup_optimizers(optimizer)."
            )

    @override
    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """Step the optimizer, then count the attempt, which averages if the period is over."""
        self._begun()
        with self._step_watch.stepping(optimizer):
            return super().optimizer_step(optimizer, **kwargs)

    @override
    def teardown(self) -> None:
        """End the run: optimizers no longer count their steps, and nothing is averaged any more."""
        super().teardown()
        self._step_watch.stop()
        if self._session is not None:
            self._session.close()

    # Details

    def _begun(self) -> TrainingSession:
        """The session, which begins with the first step, or with the checkpoint that is loaded before it."""
        if self._session is None:
            self._session = TrainingSession(
                self._optimizers,
                self._period,
                self._options,
                module=self._modules[0] if len(self._modules) == 1 else nn.ModuleList(self._modules),
                workers=self._workers,
                listeners=self._listeners,
            )
            self._set_up(self._session)
        return self._session

    def _set_up(self, session: TrainingSession) -> None:
        """Tell the rules how long the run is, as far as that is known."""
        try:
            session.setup(self._total_steps)
        except ValueError:
            if self._total_steps is not None:
                raise
            rank_zero_warn(
                f"{self._period!r} has phases that are shares of the run, and Fabric does not know how long that is:"
                f" they are taken as shares of {ASSUMED_STEPS} steps. Say how long it is before the first step,"
                " fabric.strategy.set_total_steps(epochs * len(loader)), or give the phases in steps, such as"
                " AdaptivePeriod(sampling=1000)."
            )
            session.setup(ASSUMED_STEPS)

    def _count_step(self, optimizer: Optimizer) -> None:
        session = self._begun()
        local_sgd = session.of(optimizer)
        if local_sgd is None:
            raise MisconfigurationException(
                f"A {type(optimizer).__name__} was stepped that was not set up. Each optimizer's local steps are"
                " counted: pass all of them to fabric.setup(model, optimizer) or fabric.setup_optimizers(optimizer)."
            )
        self._has_stepped = True
        session.step(local_sgd)
        if not local_sgd.has_trained:
            self._buffers_after_round = self._buffers()

    def _any_worker(self, session: TrainingSession, moved: bool) -> bool:
        """Whether buffers have moved anywhere: all workers have to come to the round that this asks for.

        One worker alone may have run the model. Where there were steps, there is a round in any case.
        """
        if self._workers.size == 1 or not self._options.average_buffers:
            return moved
        if any(local_sgd.has_trained for local_sgd in session.local_sgd):
            return moved
        session.handshake("a validation")
        with naming_lost_workers(self._workers, "asking whose buffers have moved"):
            return bool(self._workers.table([moved]).any())

    def _buffers(self) -> list[tuple[int, int]]:
        """Which buffers there are, and how often each was changed.

        Forward passes move BatchNorm's statistics. torch counts that only for ``num_batches_tracked``, so integers are
        looked at too.
        """
        if not self._options.average_buffers:
            return []
        return [(id(buffer), buffer._version) for module in self._modules for buffer in module.buffers()]
