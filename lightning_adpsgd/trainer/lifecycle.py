"""Ends a process after a failure, without leaving others waiting for it, and without waiting for them."""

import atexit
import logging
import signal
import subprocess
import sys
import time

from lightning_adpsgd.errors import WorkerLostError
from lightning_adpsgd.session import TrainingSession
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.spare_threads import run_aside

from .compat import stop_watching_children
from .family import DDPStrategy, SIGTERMException

_SECONDS_FOR_CHILDREN_TO_END = 10.0
_SECONDS_FOR_OTHERS_TO_READ = 2.0
_SECONDS_TO_EXIT = 40

_log = logging.getLogger(__name__)

_failures: list[tuple[DDPStrategy, WorkerGroup, BaseException]] = []


def report_failure(
    strategy: DDPStrategy, workers: WorkerGroup, session: TrainingSession | None, exception: BaseException
) -> None:
    """Post a status for the other ranks, which may be waiting for this one, and have them end with this process."""
    end_others_at_exit(strategy, workers, exception)
    if isinstance(exception, WorkerLostError):
        return  # naming_lost_workers() has posted a status, and the other ranks know
    where = session.progress if session is not None and session.local_sgd else "setup"
    what = f"{type(exception).__name__}: {exception}".splitlines()[0]
    workers.peers.post_status(f"had failed at {where}: {what}", failed=True)
    if not isinstance(exception, KeyboardInterrupt | SIGTERMException):
        _log.error(f"Rank {strategy.global_rank} failed at {where}: {what}")


def end_others_at_exit(strategy: DDPStrategy, workers: WorkerGroup, exception: BaseException) -> None:
    """After a failure on this rank, make sure that no other rank waits for it once the process has ended.

    Lightning does not stop the processes that its launcher has started: they would only notice in their next
    collective, with NCCL after its timeout. So at exit this process closes its connections, which they notice, and
    gives them some seconds to report before it kills them. If the script continues instead, call
    :func:`forget_failure`.
    """
    if workers.size == 1:
        return
    if not _failures:
        atexit.register(_end_others)
    _failures[:] = [(strategy, workers, exception)]


def forget_failure() -> None:
    """Leave the other processes alone, since the script has caught the error and continues."""
    _failures.clear()
    atexit.unregister(_end_others)


def _end_others() -> None:
    stop_watching_children()  # Lightning would kill this process, with another exit code, once a child has ended
    for strategy, workers, _ in _failures:
        workers.peers.abort()
        workers.peers.linger(seconds=_SECONDS_FOR_OTHERS_TO_READ)
        children = getattr(strategy.launcher, "procs", None) or []
        deadline = time.monotonic() + _SECONDS_FOR_CHILDREN_TO_END
        for rank, child in enumerate(children, strategy.global_rank + 1):
            if not isinstance(child, subprocess.Popen):
                continue
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                if workers.peers.is_ending(rank):
                    continue  # it exits by itself, and may still have files to upload
                child.kill()
                child.wait()


@atexit.register  # at import, so that it runs after the exit handlers of scripts and loggers
def _limit_the_time_to_exit() -> None:
    """Have an alarm end this process if native threads that wait for another rank keep it from exiting."""
    if not any(_ends_the_process(exception) for *_, exception in _failures) or not hasattr(signal, "alarm"):
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_SECONDS_TO_EXIT)
    run_aside(_postpone_the_alarm)


def _ends_the_process(exception: BaseException) -> bool:
    if isinstance(exception, SIGTERMException):
        return False  # all ranks have raised it at the same step, so none waits for another
    # The interpreter records uncaught errors, but not SystemExit.
    return not isinstance(exception, Exception) or getattr(sys, "last_value", None) is not None


def _postpone_the_alarm() -> None:
    """Postpone the alarm while the interpreter runs threads: other work at exit may take its time."""
    while True:
        signal.alarm(_SECONDS_TO_EXIT)
        time.sleep(0.5)
