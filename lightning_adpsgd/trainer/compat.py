"""Every corner of Lightning without a public name that this package touches, each with the reason why."""

import atexit
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelPruning, Timer

# `DDPStrategy` starts all ranks from the same weights inside the `DistributedDataParallel` wrapper, which this package
# leaves out. This is what Lightning itself calls wherever it leaves the wrapper out (validation, testing).
from lightning.pytorch.overrides.distributed import _sync_module_states as sync_module_states
from lightning.pytorch.plugins.io import AsyncCheckpointIO, async_plugin
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.prune import BasePruningMethod

from lightning_adpsgd.averaging.layout import has_mean
from lightning_adpsgd.workers.group import WorkerGroup

# Bits of a notice
SIGTERM = 1
REQUEUE = 2
TIME_IS_UP = 4

_SECONDS_FOR_LAST_WORDS = 10.0
_SECONDS_TO_STAY = 2.0
_SECONDS_TO_END = 40

__all__ = [
    "REQUEUE",
    "SIGTERM",
    "TIME_IS_UP",
    "DeferredSignals",
    "callbacks_of",
    "current_hook",
    "end_others_at_exit",
    "forget_failure",
    "is_interrupted",
    "pruned",
    "prunes_after_training",
    "second_weights",
    "snapshot",
    "step_of_the_loss",
    "sync_module_states",
    "trainer_of",
    "validates_by_the_clock",
    "wrap_for_gradients_of",
]


def trainer_of(module: "pl.LightningModule | None") -> "pl.Trainer | None":
    """The Trainer of a module, or None: the public ``module.trainer`` raises where there is none."""
    return None if module is None else module._trainer


def callbacks_of(trainer: "pl.Trainer") -> list[Any]:
    """The Trainer's callbacks, which are set outside of its own file, and so are unknown to type checkers."""
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def is_interrupted(trainer: "pl.Trainer | None") -> bool:
    """Whether this rank is on its way out of an exception, on which its peers may know nothing of."""
    return trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED


def snapshot(checkpoint: dict[str, Any], checkpoint_io: Any) -> dict[str, Any]:
    """What to hand to the plugin that writes files: a copy, if it writes later and takes none itself.

    ``AsyncCheckpointIO`` of early Lightning 2.5 writes what the tensors hold by the time that it comes to it.
    """
    if not isinstance(checkpoint_io, AsyncCheckpointIO) or hasattr(async_plugin, "_clone_tensor"):
        return checkpoint
    return apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().clone())  # type: ignore[no-any-return]


def validates_by_the_clock(trainer: "pl.Trainer") -> bool:
    """Whether ``val_check_interval`` is a time (from Lightning 2.6 on)."""
    return getattr(trainer, "_val_check_time_interval", None) is not None


def step_of_the_loss(trainer: "pl.Trainer") -> int:
    """The step at which Lightning logs the loss of the batch in hand, with whatever else is logged during it.

    It is the number of batches before it that led to a step. The public ``trainer.global_step`` counts the steps of all
    optimizers.
    """
    batches: int | None = getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", None)
    return trainer.global_step if batches is None else batches


def second_weights(trainer: "pl.Trainer") -> list[Tensor]:
    """The floating-point tensors of models that callbacks keep beside the one in training, to validate and to save.

    They are those of ``WeightAveraging`` and its subclasses (from Lightning 2.6 on).
    """
    kind = getattr(pl.callbacks, "WeightAveraging", None)
    models = [callback._average_model for callback in callbacks_of(trainer) if kind and isinstance(callback, kind)]
    tensors: list[Tensor] = []
    for model in models:
        if isinstance(model, nn.Module):
            tensors += [*model.parameters(), *model.buffers()]
    return [tensor for tensor in tensors if has_mean(tensor)]


def prunes_after_training(callback: ModelPruning) -> bool:
    """Whether it prunes when an epoch of training has ended, and not after a validation."""
    return getattr(callback, "_prune_on_train_epoch_end", True)


def pruned(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Where torch prunes: modules, and the name of a parameter of each.

    torch has no public way to ask for the names. Of a pruned ``weight`` it keeps ``weight_orig``, the parameter;
    ``weight_mask``, a buffer; and as ``weight`` their product at the latest forward pass.
    """
    return [
        (part, hook._tensor_name)
        for part in module.modules()
        for hook in part._forward_pre_hooks.values()
        if isinstance(hook, BasePruningMethod)
    ]


def wrap_for_gradients_of(strategy: "pl.strategies.DDPStrategy", group: Any) -> None:
    """Wrap the model as ``DDPStrategy`` does, for gradients to be averaged in a group of the ranks only.

    A wrapper knows the parameters that required gradients when it was made, and no others: after a change this is to be
    called again. Without any such parameter there is nothing to average, and nothing to wrap.
    """
    wrapper = strategy.model
    if isinstance(wrapper, DistributedDataParallel):
        # Somebody may still hold the wrapper, and its hooks would go on averaging.
        wrapper._remove_autograd_hooks()
        strategy.model = wrapper.module
    assert strategy.model is not None
    if any(parameter.requires_grad for parameter in strategy.model.parameters()):
        strategy._ddp_kwargs["process_group"] = group
        strategy.model = strategy._setup_model(strategy.model)


_failed: "list[tuple[pl.strategies.DDPStrategy, WorkerGroup, BaseException]]" = []


def end_others_at_exit(strategy: "pl.strategies.DDPStrategy", workers: WorkerGroup, exception: BaseException) -> None:
    """After a failure on this rank: if the process ends because of it, see that the others do not wait for it.

    Lightning leaves the processes that its launcher has started to themselves. They find out in their next collective,
    but with NCCL only after its timeout. So they are left alone in a way that they notice, and have some seconds to say
    what they have to say. If the script goes on instead, :func:`forget_failure` calls this off. One process alone has
    nobody to end.
    """
    if workers.size == 1:
        return
    if not _failed:
        atexit.register(_end_others)
    _failed[:] = [(strategy, workers, exception)]


def forget_failure() -> None:
    """The script has caught the error and goes on: leave everybody alone."""
    _failed.clear()
    atexit.unregister(_end_others)


def _end_others() -> None:
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            # Lightning's own watch would kill this process, with another exit code, as soon as a child has ended.
            vars(thread)["_run"] = _nothing_to_observe
    for strategy, workers, _ in _failed:
        workers.peers.abort()
        workers.peers.linger(seconds=_SECONDS_TO_STAY)
        started = getattr(strategy.launcher, "procs", None) or []
        deadline = time.monotonic() + _SECONDS_FOR_LAST_WORDS
        for rank, child in enumerate(started, strategy.global_rank + 1):
            if not isinstance(child, subprocess.Popen):
                continue
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                if workers.peers.is_ending(rank):
                    continue  # by itself, and it may have files to upload
                child.kill()
                child.wait()


@atexit.register  # when this package is imported, so that it runs after what scripts and loggers register later
def _see_to_it_that_this_process_ends() -> None:
    """Have the system end this process if native threads that wait for a peer keep it from ending by itself."""
    if not any(_ends_the_process(exception) for *_, exception in _failed) or not hasattr(signal, "alarm"):
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_SECONDS_TO_END)
    threading.Thread(target=_put_off_the_alarm, daemon=True).start()


def _ends_the_process(exception: BaseException) -> bool:
    if isinstance(exception, SIGTERMException):
        return False  # which all ranks have raised at the same step: nobody is waited for
    # The interpreter notes an error that nobody has caught, unless it is one that stands for an exit.
    return not isinstance(exception, Exception) or getattr(sys, "last_value", None) is not None


def _put_off_the_alarm() -> None:
    """As long as there is an interpreter that runs threads: somebody else's work at exit is none of ours."""
    while True:
        signal.alarm(_SECONDS_TO_END)
        time.sleep(0.5)


def current_hook(module: "pl.LightningModule") -> str | None:
    """The hook that is running: tells a reduction at every step, which is worth a warning, from one per epoch."""
    return getattr(module, "_current_fx_name", None)


class DeferredSignals:
    """Makes preemption wait for an averaging round, instead of communicating at every batch or in a signal handler.

    From 2.5.2 on, Lightning broadcasts at every batch whether SIGTERM has come, and its signal handler broadcasts too;
    on SLURM, the handler of the requeue signal saves a checkpoint, which here would be an averaging round. A rank that
    communicates between two rounds meets ranks that do not. So while this is installed, the handlers take a note
    (``raise_notice``) and do nothing else. The note reaches all ranks with the next round, and then
    :meth:`act` does on every rank, at the same step, what the handler would have done. The same goes for Lightning's
    ``Timer`` (``Trainer(max_time=...)``), which asks rank 0 at every batch whether the time is up.

    Args:
        trainer: the Trainer whose signal handling is deferred.
        raise_notice: called from the signal handler with ``SIGTERM`` or ``REQUEUE``, and with ``TIME_IS_UP``.
    """

    def __init__(self, trainer: "pl.Trainer", raise_notice: Callable[[int], None]) -> None:
        self._trainer = trainer
        self._raise_notice = raise_notice
        self._connector: Any = trainer._signal_connector
        self._epoch_loop: Any = trainer.fit_loop.epoch_loop
        self._requeue: Callable[..., None] | None = None
        self._timers: list[Timer] = []

    def install(self) -> None:
        """Take over, before Lightning registers its handlers for the run."""
        self._requeue = getattr(self._connector, "_slurm_sigusr_handler_fn", None)
        self._connector._sigterm_notifier_fn = self._note_sigterm
        self._connector._slurm_sigusr_handler_fn = self._note_requeue
        if hasattr(self._epoch_loop, "_broadcast_sigterm_tensor"):
            self._epoch_loop._broadcast_sigterm_tensor = _do_nothing

    def install_timers(self) -> None:
        """Take over from the timers that look at every batch, once they have had their look at the start."""
        for callback in callbacks_of(self._trainer):
            if isinstance(callback, Timer) and callback._interval == "step" and callback.time_remaining() is not None:
                self._timers.append(callback)
                vars(callback)["_check_time_remaining"] = self._note_time

    def remove(self) -> None:
        """Give back; may be called more than once."""
        for owner, name in (
            (self._connector, "_sigterm_notifier_fn"),
            (self._connector, "_slurm_sigusr_handler_fn"),
            (self._epoch_loop, "_broadcast_sigterm_tensor"),
            *((timer, "_check_time_remaining") for timer in self._timers),
        ):
            vars(owner).pop(name, None)

    def act(self, notice: int) -> None:
        """Do what the signals in ``notice`` ask for, on this rank as on all others."""
        if notice & REQUEUE and self._requeue is not None:
            self._requeue(_requeue_signal(self._trainer), None)
        if notice & TIME_IS_UP:
            for timer in self._timers:
                type(timer)._check_time_remaining(timer, self._trainer)
        if notice & SIGTERM:
            # Lightning's loops look at this after every batch, and raise SIGTERMException.
            self._connector.received_sigterm = True

    def _note_sigterm(self, signum: Any, _: Any) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)  # the processes that this rank has started hear of it, as they do in Lightning
        self._raise_notice(SIGTERM)

    def _note_requeue(self, signum: Any, _: Any) -> None:
        self._raise_notice(REQUEUE)

    def _note_time(self, _: Any) -> None:
        remaining = [timer.time_remaining() for timer in self._timers]
        if self._trainer.is_global_zero and any(seconds is not None and seconds <= 0 for seconds in remaining):
            self._raise_notice(TIME_IS_UP)


def _requeue_signal(trainer: "pl.Trainer") -> Any:
    environment = trainer._accelerator_connector.cluster_environment
    return getattr(environment, "requeue_signal", None)


def _nothing_to_observe() -> bool:
    """Stands in for a look at the children, and says that there need be no further one."""
    return True


def _do_nothing() -> None:
    """Stands in for the broadcast at every batch."""
