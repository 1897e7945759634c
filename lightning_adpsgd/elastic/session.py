"""A training run among workers that come and go, for any training framework."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_adpsgd.elastic.local_sgd import ElasticLocalSGD
from lightning_adpsgd.elastic.options import ElasticOptions
from lightning_adpsgd.elastic.worker_state import JoinableState
from lightning_adpsgd.options import AveragingOptions
from lightning_adpsgd.periods import AveragingPeriod
from lightning_adpsgd.rounds.handshake import Kind
from lightning_adpsgd.rounds.record import AveragingRound, Trigger
from lightning_adpsgd.session import TrainingSession
from lightning_adpsgd.workers.group import WorkerGroup


class ElasticSession(TrainingSession):
    """A :class:`TrainingSession` of one optimizer, whose workers meet in rounds and nowhere else: no handshakes.

    Args:
        optimizers: the run's optimizers; there has to be one.
        period: the rule.
        options: how to average.
        module: the model.
        elastic: how the workers meet.
        state: what a worker that joins receives.
        listeners: called with the record of every round.

    Raises:
        ValueError: if there is not one optimizer, or as of :class:`ElasticLocalSGD`.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        period: AveragingPeriod,
        options: AveragingOptions,
        *,
        module: nn.Module,
        elastic: ElasticOptions,
        state: JoinableState,
        listeners: Sequence[Callable[[AveragingRound], None]] = (),
    ) -> None:
        if len(optimizers) != 1:
            raise ValueError(
                f"{len(optimizers)} optimizers with elastic workers: expected one, because a worker that is lost"
                " between the rounds of two optimizers would leave them at different steps. Return one optimizer with"
                " several parameter groups, or leave out elastic=..."
            )
        self._elastic, self._state = elastic, state
        super().__init__(optimizers, period, options, module=module, workers=WorkerGroup(), listeners=listeners)
        self.workers = self._only.workers

    @property
    def is_writer(self) -> bool:
        """Whether this worker writes logs and checkpoints for all."""
        return self._only.is_writer

    @property
    def steps(self) -> int:
        """Optimizer steps attempted, those of the run before this worker has joined included."""
        return self._only.steps

    def join(self) -> None:
        """Start with the other workers, or join them in their next round; see :meth:`ElasticLocalSGD.broadcast`."""
        self._only.broadcast()

    def leave_soon(self) -> None:
        """Wait no longer than ``leave_timeout`` for others from now on. May be called by a signal handler."""
        self._only.leave_soon()

    @override
    def average(self, trigger: Trigger, further: Sequence[Tensor] = ()) -> bool:
        """Average with the workers that are there, unless no step was taken since the latest round."""
        before = self._only.rounds
        self._only.average(trigger)
        return self._only.rounds > before

    @override
    def handshake(self, kind: Kind, where: str = "") -> None:
        """Do nothing: workers may be at different steps, and elastic rounds find out themselves who takes part."""

    @override
    def adopt_first(self, tensors: Sequence[Tensor]) -> None:
        """Do nothing, as in :meth:`handshake`."""

    @override
    def state_dict(self, with_optimizers: bool = True) -> dict[str, Any]:
        """As of :class:`TrainingSession`. A checkpoint holds the optimizer's state of the worker that writes it."""
        return {**super().state_dict(with_optimizers), "averaged": not self._only.has_trained}

    @override
    def workers_changed(self, state: Mapping[str, Any]) -> str | None:
        return None  # here it may change at any time

    @override
    def _new_local_sgd(
        self,
        optimizer: Optimizer,
        period: AveragingPeriod,
        options: AveragingOptions,
        owners: dict[int, Any],
        index: int,
    ) -> ElasticLocalSGD:
        self._only = ElasticLocalSGD(
            optimizer,
            period,
            module=self.module,
            total_steps="later",
            options=options,
            elastic=self._elastic,
            worker_state=self._state,
            index=index,
        )
        return self._only
