"""What rounds do to an optimizer's state: leave it alone, average, estimate or reset its moments; and share it."""

from collections.abc import Collection, Sequence
from functools import partial
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_adpsgd.averaging.averager import OnDeviations
from lightning_adpsgd.averaging.estimate import MomentEstimate, check_known_momentum
from lightning_adpsgd.averaging.look_ahead import LookAhead
from lightning_adpsgd.averaging.momentum import MomentumReader, check_known_moments
from lightning_adpsgd.averaging.optimizer_state import (
    forget,
    has_state,
    moments,
    reset_moments,
    share_state,
    state_at_start,
)
from lightning_adpsgd.workers.contribution import Contribution
from lightning_adpsgd.workers.group import WorkerGroup


class StatePolicy:
    """Applies one policy to the state of one optimizer.

    Args:
        optimizer: the optimizer.
        policy: "local", "average", "reset" or "estimate".
        drops: whether rounds may drop a worker, which then starts over with the initial state.
        workers: the workers to average over.
        bucket_bytes: size of the largest bucket.

    Raises:
        ValueError: if the policy is "reset" or "estimate", and the optimizer's moments are not known.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        policy: Literal["local", "average", "reset", "estimate"],
        drops: bool,
        workers: WorkerGroup,
        bucket_bytes: int,
    ) -> None:
        if policy == "reset":
            check_known_moments(optimizer)
        elif policy == "estimate":
            check_known_momentum(optimizer)
        self._optimizer = optimizer
        self._policy = policy
        self._workers = workers
        self._bucket_bytes = bucket_bytes
        # Of schedule-free optimizers, eval() and train() compute other weights from the state. All workers get the same
        # weights only if their state is the same.
        self._has_modes = all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval"))
        self._at_start = state_at_start(optimizer) if drops else {}
        self.anybody_has_state = True
        """Whether any worker's optimizer has state, as far as this worker knows."""
        self.shared_at = 0
        """The step at which the state was last the same on all workers."""
        self.reset_at = 0
        """The step at which moments were last reset, on all workers."""
        self._dropped_at = 0  # the step at which this worker alone lost its state
        self._steps = 0
        reader = MomentumReader(optimizer, self._steps_of_moments)
        self.look_ahead = LookAhead(optimizer, reader).factors
        self._estimate = MomentEstimate(optimizer, reader, workers.count) if policy == "estimate" else None

    def _steps_of_moments(self) -> int:
        """The number of steps over which this worker's moments have been accumulated."""
        return self._steps - max(self.reset_at, self._dropped_at)

    @property
    def has_state(self) -> bool:
        """Whether this worker's optimizer has any state."""
        return has_state(self._optimizer)

    def count(self, steps: int) -> None:
        """Set the number of steps that the optimizer has attempted."""
        self._steps = steps

    def note_step(self) -> None:
        """Count a step that the optimizer has attempted."""
        self._steps += 1
        if self._estimate is not None:
            self._estimate.note_step()

    def estimate(
        self, parameters: Sequence[Tensor], steps: int, ago: int = 0, ahead: Sequence[float] = ()
    ) -> OnDeviations | None:
        """The function that corrects moments by a round's deviations; None if there is nothing to correct.

        Args:
            parameters: the averaged tensors, in the order of the layout.
            steps: the number of steps over which the values sent had drifted.
            ago: how many steps ago they were sent.
            ahead: for each parameter group, how many times the latest step was added to them.
        """
        if self._estimate is None:
            return None
        corrections = self._estimate.after(steps, ago, ahead)
        if not any(each.is_one for each in corrections):
            return None
        return partial(self._estimate.correct, parameters=parameters, corrections=corrections)

    def restored(self, shared_at: int, reset_at: int) -> None:
        """Restore the state of a checkpoint."""
        self.shared_at, self.reset_at, self._dropped_at = shared_at, reset_at, 0

    def is_shared(self) -> bool:
        """Whether the state is the same on all workers: no step was taken since it was shared, or no worker has any."""
        return self.shared_at == self._steps or not self.anybody_has_state

    @property
    def moves_weights(self) -> bool:
        """Whether the optimizer may have computed weights from state that is not the same on all workers."""
        return self._has_modes and not self.is_shared()

    def shares_for(self, trigger: str) -> bool:
        """Whether a round makes all state the same on all workers: for a checkpoint, or if weights depend on it."""
        return trigger == "checkpoint" or (self._has_modes and trigger != "period")

    def apply(self, contribution: Contribution, trained: bool, share: bool) -> None:
        """Apply the policy in a full round, after the parameters were averaged.

        Args:
            contribution: this worker's contribution to the mean; a dropped worker starts over.
            trained: whether there is anything to average: steps since the workers were the same, for example.
            share: whether to make all state the same on all workers.
        """
        if not contribution.contributes:
            forget(self._optimizer, self._at_start)
            if self._estimate is not None:
                self._estimate.forget()
            self._dropped_at = self._steps
        averages = self._policy == "average"
        if averages and trained and self.anybody_has_state:
            self._share(contribution, only_moments=True)
        if trained:
            self.end_round()
        if share:
            if self.anybody_has_state:
                same = {id(moment) for moment in moments(self._optimizer)} if averages else set()
                self._share(contribution, shared=same)
                self._dropped_at = 0  # it now has the others' moments
                if self._estimate is not None:
                    self._estimate.mark_shared()
            self.shared_at = self._steps

    def end_round(self) -> None:
        """Apply what the policy does at the end of every round: reset moments, if asked for."""
        if self._policy == "reset":
            reset_moments(self._optimizer)
            self.reset_at = self._steps

    def _share(self, contribution: Contribution, shared: Collection[int] = (), only_moments: bool = False) -> None:
        share_state(self._optimizer, self._workers, self._bucket_bytes, shared, contribution, only_moments)
