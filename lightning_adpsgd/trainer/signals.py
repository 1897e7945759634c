"""Defers signals and time limits that stop a run to an averaging round, so that all ranks act at the same step."""

from collections.abc import Callable
from typing import Any

from .compat import Method, requeue_signal, signal_methods, stop_as_after_sigterm, time_checks
from .family import pl

# Flags: bits that any rank may raise, and that all ranks learn in their next averaging round
SIGTERM = 1
REQUEUE = 2
TIME_IS_UP = 4


class DeferredSignals:
    """Defers preemption to an averaging round, instead of communicating at every batch or in a signal handler.

    From 2.5.2 on, Lightning broadcasts at every batch whether SIGTERM was received, and its signal handler broadcasts,
    too; on SLURM, the handler of the requeue signal saves a checkpoint, which here is an averaging round. Between two
    rounds the other ranks would not take part. So while this is installed, the handlers only raise a flag. All ranks
    learn of it in the next round, and :meth:`act` then does on every rank, at the same step, what the handler would
    have done. The same holds for ``Timer`` (``Trainer(max_time=...)``), which asks rank 0 at every batch.

    Args:
        trainer: the Trainer whose signal handling is deferred.
        raise_flags: called with ``SIGTERM`` or ``REQUEUE`` from the signal handler, and with ``TIME_IS_UP``.
    """

    def __init__(self, trainer: "pl.Trainer", raise_flags: Callable[[int], None]) -> None:
        self._trainer = trainer
        self._raise_flags = raise_flags
        self._requeue: Callable[..., None] | None = None
        self._time_checks: list[Method] = []

    def install(self) -> None:
        """Replace Lightning's handlers, before it registers them for the run."""
        on_sigterm, on_requeue, broadcast = signal_methods(self._trainer)
        self._requeue = getattr(*on_requeue, None)
        setattr(*on_sigterm, self._on_sigterm)
        setattr(*on_requeue, lambda *_: self._raise_flags(REQUEUE))
        setattr(*broadcast, lambda: None)

    def install_timers(self) -> None:
        """Replace the timers' checks at every step, after they have started their clocks."""
        self._time_checks = time_checks(self._trainer)
        for check in self._time_checks:
            setattr(*check, self._on_time_check)

    def remove(self) -> None:
        """Restore Lightning's methods; may be called more than once."""
        for owner, name in (*signal_methods(self._trainer), *self._time_checks):
            owner.__dict__.pop(name, None)

    def act(self, flags: int) -> None:
        """Do what the ``flags`` ask for."""
        if flags & REQUEUE and self._requeue is not None:
            self._requeue(requeue_signal(self._trainer), None)
        if flags & TIME_IS_UP:
            for timer, name in self._time_checks:
                getattr(type(timer), name)(timer, self._trainer)
        if flags & SIGTERM:
            stop_as_after_sigterm(self._trainer)

    def _on_sigterm(self, signum: Any, _: Any) -> None:
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)  # pass it on to the processes that this rank has started, as Lightning does
        self._raise_flags(SIGTERM)

    def _on_time_check(self, _: Any) -> None:
        remaining = [timer.time_remaining() for timer, _ in self._time_checks]
        if self._trainer.global_rank == 0 and any(seconds is not None and seconds <= 0 for seconds in remaining):
            self._raise_flags(TIME_IS_UP)
