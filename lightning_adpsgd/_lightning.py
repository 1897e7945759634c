"""Every corner of Lightning without a public name that this package touches, each with the reason why."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl

# `DDPStrategy` starts all ranks from the same weights inside the `DistributedDataParallel` wrapper, which this package
# leaves out. This is what Lightning itself calls wherever it leaves the wrapper out (validation, testing).
from lightning.pytorch.overrides.distributed import _sync_module_states as sync_module_states

# Bits of a notice
SIGTERM = 1
REQUEUE = 2

__all__ = ["REQUEUE", "SIGTERM", "DeferredSignals", "current_hook", "sync_module_states"]


def current_hook(module: "pl.LightningModule") -> str | None:
    """The hook that is running: tells a reduction at every step, which is worth a warning, from one per epoch."""
    return getattr(module, "_current_fx_name", None)


class DeferredSignals:
    """Makes preemption wait for an averaging round, instead of communicating at every batch or in a signal handler.

    From 2.5.2 on, Lightning broadcasts at every batch whether SIGTERM has come, and its signal handler broadcasts too;
    on SLURM, the handler of the requeue signal saves a checkpoint, which here would be an averaging round. A rank that
    communicates between two rounds meets ranks that do not. So while this is installed, the handlers take a note
    (``raise_notice``) and do nothing else. The note reaches all ranks with the next round, and then
    :meth:`act` does on every rank, at the same step, what the handler would have done.

    Args:
        trainer: the Trainer whose signal handling is deferred.
        raise_notice: called from the signal handler with ``SIGTERM`` or ``REQUEUE``.
    """

    def __init__(self, trainer: "pl.Trainer", raise_notice: Callable[[int], None]) -> None:
        self._trainer = trainer
        self._raise_notice = raise_notice
        self._connector: Any = trainer._signal_connector
        self._epoch_loop: Any = trainer.fit_loop.epoch_loop
        self._requeue: Callable[..., None] | None = None

    def install(self) -> None:
        """Take over, before Lightning registers its handlers for the run."""
        self._requeue = getattr(self._connector, "_slurm_sigusr_handler_fn", None)
        self._connector._sigterm_notifier_fn = self._note_sigterm
        self._connector._slurm_sigusr_handler_fn = self._note_requeue
        if hasattr(self._epoch_loop, "_broadcast_sigterm_tensor"):
            self._epoch_loop._broadcast_sigterm_tensor = _do_nothing

    def remove(self) -> None:
        """Give back; may be called more than once."""
        for owner, name in (
            (self._connector, "_sigterm_notifier_fn"),
            (self._connector, "_slurm_sigusr_handler_fn"),
            (self._epoch_loop, "_broadcast_sigterm_tensor"),
        ):
            vars(owner).pop(name, None)

    def act(self, notice: int) -> None:
        """Do what the signals in ``notice`` ask for, on this rank as on all others."""
        if notice & REQUEUE and self._requeue is not None:
            self._requeue(_requeue_signal(self._trainer), None)
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


def _requeue_signal(trainer: "pl.Trainer") -> Any:
    environment = trainer._accelerator_connector.cluster_environment
    return getattr(environment, "requeue_signal", None)


def _do_nothing() -> None:
    """Stands in for the broadcast at every batch."""
