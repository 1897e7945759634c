"""All optimizers of a training run: their rounds, handshakes and checkpoint entries, for any training framework."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging.buffers import AveragedBuffers
from lightning_adpsgd.averaging.layout import has_mean, hash48
from lightning_adpsgd.averaging.update import Update
from lightning_adpsgd.local_sgd import LocalSGD
from lightning_adpsgd.options import AveragingOptions
from lightning_adpsgd.periods import AveragingPeriod
from lightning_adpsgd.rounds.handshake import (
    KINDS,
    Handshake,
    Kind,
    RankState,
    SignalFlags,
    check_module,
    naming_lost_workers,
)
from lightning_adpsgd.rounds.record import AveragingRound, Trigger
from lightning_adpsgd.rounds.untrained import content_hash, that_differ
from lightning_adpsgd.workers.group import WorkerGroup

CHECKPOINT_KEY = "adpsgd"
"""Under which a checkpoint holds the result of :meth:`TrainingSession.state_dict`."""


class TrainingSession:
    """Holds one :class:`LocalSGD` per optimizer, and does what concerns all of them.

    A training framework's adapter (Lightning's strategy, for example) tells it when an optimizer has stepped and when
    the weights are about to be read.

    Args:
        optimizers: the run's optimizers, in the same order on all ranks.
        period: the rule; each optimizer gets its own copy.
        options: how to average.
        module: the model, whose buffers join the rounds.
        workers: the workers to average over.
        listeners: called with the record of every round.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        period: AveragingPeriod,
        options: AveragingOptions,
        *,
        module: nn.Module,
        workers: WorkerGroup,
        listeners: Sequence[Callable[[AveragingRound], None]] = (),
    ) -> None:
        self.workers = workers
        self.module = module
        self.flags = SignalFlags()
        """Bits that any worker may raise, and that all learn at the next round."""
        self._options = options
        self._buffers_moved = False
        self._untrained_may_differ = False
        self.local_sgd: list[LocalSGD] = []
        """One per optimizer, in their order."""
        owners: dict[int, Any] = {}
        self._async_group: WorkerGroup | None = None
        try:
            if len(optimizers) > 1 and options.is_spread and workers.can_share_async_group:
                with naming_lost_workers(workers, "opening connections"):
                    self._async_group = workers.new_async_group()
            for index, optimizer in enumerate(optimizers):
                own = dataclasses.replace(options, update=_copied(options.update))
                self.local_sgd.append(self._new_local_sgd(optimizer, copy.deepcopy(period), own, owners, index))
        except BaseException:
            self.close()
            raise
        for listener in listeners:
            self.subscribe(listener)

    def subscribe(self, listener: Callable[[AveragingRound], None]) -> None:
        """Call ``listener`` with the record of every round of every optimizer, on every worker."""
        for local_sgd in self.local_sgd:
            local_sgd.subscribe(listener)

    def setup(self, total_steps: int | None) -> None:
        """Tell the rules how many steps each optimizer will take. All workers have to hold the same weights by then."""
        for local_sgd in self.local_sgd:
            local_sgd.setup(total_steps)
            local_sgd.mark_synchronized()

    def of(self, optimizer: Optimizer) -> LocalSGD | None:
        """The :class:`LocalSGD` of an optimizer; None if it is not one of the run's optimizers."""
        return next((each for each in self.local_sgd if each.optimizer is optimizer), None)

    def note_forward(self) -> None:
        """Record that a forward pass may change buffers, such as BatchNorm statistics."""
        self._buffers_moved = self._untrained_may_differ = True

    def step(self, local_sgd: LocalSGD) -> None:
        """Count a step of an optimizer, and average if its period is over."""
        self._untrained_may_differ = True
        local_sgd.step()
        if not local_sgd.has_trained:
            self._buffers_moved = False

    def average(self, trigger: Trigger, further: Sequence[Tensor] = ()) -> bool:
        """Average what has been trained since the latest round, if anything has.

        Parameters that no optimizer trains (a target network, an EMA teacher) are averaged too if workers have come to
        hold different ones. Both are linear in the weights, so this gives the target network of the average.

        Args:
            trigger: what the round is for.
            further: further tensors to average; if there are any, there is a round in any case.

        Returns:
            Whether there was a round, so that all workers are known to be at the same point.
        """
        also = [*further]
        if self._buffers_moved and self._options.average_buffers and not any(ls.has_trained for ls in self.local_sgd):
            # Forward passes change BatchNorm statistics, even if no step has followed.
            also += AveragedBuffers(self.module, self._options.exclude_buffers).tensors()
        also += self._untrained_that_differ(trigger)
        self._buffers_moved = self._untrained_may_differ = False
        before = self._handshakes
        for place, local_sgd in enumerate(self.local_sgd):
            local_sgd.average(trigger, also if place == 0 else ())
        return self._handshakes > before

    def handshake(self, kind: Kind, where: str = "") -> None:
        """Make sure that all workers are about to do the same.

        Args:
            kind: what they are about to do.
            where: the hook that this rank is in, for error messages.

        Raises:
            WorkersDisagreeError: on every worker, if they are not.
            WorkerLostError: if a worker does not answer.
        """
        if self.workers.size > 1:
            state = RankState(KINDS.index(kind), self._steps)
            Handshake(self.workers, state, where).complete()

    def adopt_first(self, tensors: Sequence[Tensor]) -> None:
        """Give all workers the first worker's ``tensors``, if they differ between workers."""
        each = [content_hash(tensor) for tensor in tensors]
        if len(self.workers.table([hash48(repr(each).encode())]).unique()) > 1:
            check_module(self.workers, self.module)
            self.workers.broadcast_(tensors)

    @property
    def progress(self) -> str:
        """Where this worker stands, in words."""
        return ", ".join(f"step {s.steps}, {s.local_steps} after its latest averaging round" for s in self.local_sgd)

    def state_dict(self, with_optimizers: bool = True) -> dict[str, Any]:
        """The entry of a checkpoint: who has written it, and, ``with_optimizers``, their counters and rules."""
        state: dict[str, Any] = {
            "workers": self.workers.count,
            "ranks": self.workers.size,
            "averaged": all(local_sgd.is_complete for local_sgd in self.local_sgd),
            "rank": self.workers.rank,
        }
        if with_optimizers:
            state["optimizers"] = [local_sgd.state_dict() for local_sgd in self.local_sgd]
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`. All workers have to hold the same weights and optimizer state already."""
        for local_sgd, saved in zip(self.local_sgd, state["optimizers"], strict=False):
            local_sgd.load_state_dict(saved)
            local_sgd.mark_synchronized()

    def workers_changed(self, state: Mapping[str, Any]) -> str | None:
        """What to warn of if :meth:`state_dict` was written by another number of workers; None if it was not."""
        if not self.local_sgd or state["workers"] == self.workers.count:
            return None
        return (
            f"This checkpoint was written by {state['workers']} worker(s), and now there are {self.workers.count}. All"
            " continue from its average, and the averaging rule continues with its period and its target, which was"
            f" measured among {state['workers']}. The rule's phases keep their lengths in steps, although an epoch now"
            " has a different number of steps."
        )

    def go_on_from(self, former: "TrainingSession") -> None:
        """Take over the counters and rules of an earlier session on the same model, if it had as many optimizers."""
        if len(former.local_sgd) == len(self.local_sgd):
            self.load_state_dict(former.state_dict())

    def close(self) -> None:
        """Close the connections that were opened for this run."""
        for local_sgd in self.local_sgd:
            local_sgd.close()
        if self._async_group is not None:
            self._async_group.close()

    def _new_local_sgd(
        self,
        optimizer: Optimizer,
        period: AveragingPeriod,
        options: AveragingOptions,
        owners: dict[int, Any],
        index: int,
    ) -> LocalSGD:
        return LocalSGD(
            optimizer,
            period,
            module=self.module,
            total_steps="later",
            options=options,
            workers=self.workers,
            async_group=self._async_group,
            flags=self.flags,
            owners=owners,
            index=index,
        )

    def _untrained_that_differ(self, trigger: Trigger) -> list[Tensor]:
        if not (self._untrained_may_differ and self.local_sgd) or self.workers.count == 1:
            return []
        averaged = {id(tensor) for local_sgd in self.local_sgd for tensor in local_sgd.averaged}
        named = self.module.named_parameters()
        untrained = {name: each for name, each in named if id(each) not in averaged and has_mean(each)}
        return that_differ(self.workers, untrained, self._steps, trigger) if untrained else []

    @property
    def _steps(self) -> int:
        return sum(local_sgd.steps for local_sgd in self.local_sgd)

    @property
    def _handshakes(self) -> int:
        return sum(local_sgd.handshakes for local_sgd in self.local_sgd)


def _copied(update: Update | None) -> Update | None:
    try:
        return copy.deepcopy(update)
    except Exception as error:
        raise TypeError(
            f"update: {type(update).__name__} cannot be copied ({error}); expected an Update that copy.deepcopy takes,"
            " as each optimizer gets its own copy. Create locks, files and the like in its start()."
        ) from error
