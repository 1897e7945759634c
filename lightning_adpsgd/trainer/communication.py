"""Guards Lightning's own collectives: all ranks take part, or none."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_adpsgd.former_names import warn_of_former_name
from lightning_adpsgd.rounds.handshake import Kind
from lightning_adpsgd.session import TrainingSession
from lightning_adpsgd.workers.group import is_default

from .compat import current_hook, is_interrupted, trainer_of
from .family import rank_zero_warn
from .launching import LaunchedProcesses

_HOOKS_OF_A_STEP = ("on_train_batch_start", "training_step", "on_train_batch_end")


class GuardedCommunication(LaunchedProcesses):
    """While fitting, workers check that all of them are about to make the same call before Lightning communicates.

    Ranks in different collectives would wait for each other, or crash. A rank that is handling an exception takes part
    in nothing, since the others may not either.
    """

    def __init__(self, **launching: Any) -> None:
        super().__init__(**launching)
        self._session: TrainingSession | None = None  # of the latest fit
        self._fitting = False
        self._communicated_at: int | None = None
        self._warned_of_communication = False

    @property
    def session(self) -> TrainingSession | None:
        """All optimizers of the latest ``fit``; None before the first one."""
        return self._session

    def handshake(self, kind: Kind) -> None:
        """While fitting, check that all workers are about to do the same; warn if this happens at every step.

        Args:
            kind: what they are about to do.

        Raises:
            WorkersDisagreeError: on every worker, if they are not.
            WorkerLostError: if a worker does not answer.
        """
        if not self._fitting or self._session is None or self._session.workers.size == 1:
            return
        self._warn_of_communication()
        hook = None if self.lightning_module is None else current_hook(self.lightning_module)
        self._session.handshake(kind, f"`{hook}`" if hook else "")

    def meet(self, kind: Kind) -> None:
        """Former name of :meth:`handshake`."""
        warn_of_former_name("ADPSGDStrategy.meet", "ADPSGDStrategy.handshake")
        self.handshake(kind)

    @override
    def barrier(self, *args: Any, **kwargs: Any) -> None:
        if not self._is_alone():
            self.handshake("Lightning's barrier")
            super().barrier(*args, **kwargs)

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if self._is_alone():
            return obj
        self.handshake("Lightning's broadcast")
        return super().broadcast(obj, src)

    @override
    def reduce(self, tensor: Any, group: Any | None = None, reduce_op: Any | None = "mean") -> Any:
        if self._is_alone():
            return tensor
        if is_default(group):  # others do not come to what a subgroup does
            self.handshake("Lightning's reduction")
        return super().reduce(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        return decision if self._is_alone() else super().reduce_boolean_decision(decision, all)

    @override
    def all_gather(self, tensor: Tensor, group: Any | None = None, sync_grads: bool = False) -> Tensor:
        if self._is_alone():
            return tensor.unsqueeze(0)
        if is_default(group):
            self.handshake("Lightning's gathering")
        return super().all_gather(tensor, group, sync_grads)

    def _is_alone(self) -> bool:
        return is_interrupted(trainer_of(self.lightning_module))

    def _warn_of_communication(self) -> None:
        """Warn once if there is communication at two batches in a row."""
        trainer = trainer_of(self.lightning_module)
        if self._warned_of_communication or self.lightning_module is None or trainer is None:
            return
        hook = current_hook(self.lightning_module)
        if hook not in _HOOKS_OF_A_STEP:
            return
        batch = trainer.fit_loop.epoch_loop.total_batch_idx
        if self._communicated_at == batch - 1:
            self._warned_of_communication = True
            rank_zero_warn(
                f"Something in `{hook}` communicates with all workers at every step, which costs the time that periodic"
                " averaging saves. If it is `self.log(..., on_step=True, sync_dist=True)`, leave out sync_dist, or log"
                " the epoch's mean: `self.log(..., on_step=False, on_epoch=True, sync_dist=True)`. If it is"
                " `ModelCheckpoint(train_time_interval=...)`, use `every_n_train_steps`."
            )
        self._communicated_at = batch
