"""Starts workers on this machine, and starts those again that die."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from selectors import DefaultSelector
from typing import NamedTuple

from lightning_adpsgd.commands.child import Child
from lightning_adpsgd.commands.lighthouse import ANNOUNCEMENT
from lightning_adpsgd.commands.output import Output

_POLL_SECONDS = 0.1
_LIGHTHOUSE_SECONDS = 5.0  # that it has to end

_OF_OTHER_LAUNCHERS = {
    *("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE"),
    *("SLURM_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASK_PID", "SLURM_GTIDS"),
}
_PREFIXES_OF_OTHER_LAUNCHERS = ("TORCHELASTIC_", "OMPI_COMM_WORLD_", "PMI_", "PMIX_")


class Plan(NamedTuple):
    """What is to be run, and how."""

    workers: int
    command: Sequence[str]
    """Of each worker."""
    lighthouse: Sequence[str] | str
    """A lighthouse's address, or the command that starts one."""
    max_restarts: int
    restart_delay: float
    grace: float
    """Seconds that workers have to end after a signal."""


def environment_of(worker: int, workers: int, lighthouse: str, given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker: what is given, without what another launcher has left there."""
    kept = {
        name: value
        for name, value in given.items()
        if name not in _OF_OTHER_LAUNCHERS and not name.startswith(_PREFIXES_OF_OTHER_LAUNCHERS)
    }
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    return {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        **kept,
        "TORCHFT_LIGHTHOUSE": lighthouse,
        "REPLICA_GROUP_ID": str(worker),
        "NUM_REPLICA_GROUPS": str(workers),
    }


class Launcher:
    """Runs workers, and a lighthouse if it is to be started, until all workers have ended.

    Args:
        plan: what is to be run.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._selector = DefaultSelector()
        self._outputs = Output(sys.stdout), Output(sys.stderr)
        self._workers: list[Child] = []
        self._lighthouse: Child | None = None
        self._signals: list[int] = []
        self._stopped_by: int | None = None
        self._kill_at = float("inf")

    def run(self) -> int:
        """Run them; return the exit code for this process."""
        with _handled(self._signals.append):
            try:
                self._start()
                while self._is_unfinished():
                    self._pass_on_output()
                    self._note_ends()
                    self._start_what_is_due()
                    self._stop_if_asked()
                self._end_lighthouse()
            finally:
                for child in self._children():
                    child.kill()
                self._selector.close()
        return self._conclude()

    def _children(self) -> list[Child]:
        return self._workers if self._lighthouse is None else [*self._workers, self._lighthouse]

    def _start(self) -> None:
        if isinstance(self._plan.lighthouse, str):
            self._add_workers(self._plan.lighthouse)
            return
        environment = {"RUST_LOG": "warn", "PYTHONUNBUFFERED": "1", **os.environ}
        self._lighthouse = Child("lighthouse", self._plan.lighthouse, environment, self._outputs, self._selector)
        self._lighthouse.heard = self._listen_for_address
        self._start_what_is_due()

    def _listen_for_address(self, line: str) -> None:
        if self._lighthouse is None or self._workers or self._stopped_by or not line.startswith(ANNOUNCEMENT):
            return
        address = line.removeprefix(ANNOUNCEMENT).strip()
        self._lighthouse.command += ["--port", address.rpartition(":")[2]]  # where it would be started again
        self._add_workers(address)

    def _add_workers(self, address: str) -> None:
        plan = self._plan
        self._workers = [
            Child(
                f"worker {worker}",
                plan.command,
                environment_of(worker, plan.workers, address, os.environ),
                self._outputs,
                self._selector,
            )
            for worker in range(plan.workers)
        ]

    def _is_unfinished(self) -> bool:
        if not self._workers:  # the lighthouse has not told its address yet
            return self._lighthouse is not None and self._lighthouse.is_running
        return any(worker.is_running or worker.start_at is not None for worker in self._workers)

    def _pass_on_output(self) -> None:
        if not self._selector.get_map():
            time.sleep(_POLL_SECONDS)
        for key, _ in self._selector.select(_POLL_SECONDS):
            key.data()

    def _note_ends(self) -> None:
        for child in self._children():
            if child.has_ended() and self._stopped_by is None:
                self._decide_on(child)

    def _decide_on(self, child: Child) -> None:
        """Whether a child that has ended is started again."""
        if not self._workers or (child.exit_code == 0 and child is not self._lighthouse):
            return
        what = f"{child.name} has ended: {ending_of(child.exit_code)}."
        most, delay = self._plan.max_restarts, self._plan.restart_delay
        others = [worker for worker in self._workers if worker is not child]
        if others and all(worker.exit_code == 0 for worker in others):
            self._say(f"{what} It is not started again: all others have ended with exit code 0, so it would be alone.")
        elif child.restarts < most:
            child.restarts += 1
            child.start_at = time.monotonic() + delay
            self._say(f"{what} It is started again in {delay:g} s (restart {child.restarts} of {most}).")
        else:
            self._say(f"{what} It is not started again: --max-restarts is {most}.")

    def _start_what_is_due(self) -> None:
        for child in self._children():
            if self._stopped_by is None and child.start_at is not None and child.start_at <= time.monotonic():
                child.start()

    def _stop_if_asked(self) -> None:
        """Pass the first signal on, and kill after the time of grace, or on a second signal."""
        if any(output.is_closed for output in self._outputs) and not self._signals:
            self._signals.append(signal.SIGPIPE)
        if self._signals and self._stopped_by is None:
            self._stopped_by = self._signals[0]
            self._kill_at = time.monotonic() + self._plan.grace
            name = signal.Signals(self._stopped_by).name
            self._say(f"{name}: workers that have not ended within {self._plan.grace:g} s are killed.")
            for worker in self._workers:
                worker.start_at = None
                worker.signal(signal.SIGTERM if self._stopped_by == signal.SIGPIPE else self._stopped_by)
            if not self._workers and self._lighthouse is not None:
                self._lighthouse.signal(signal.SIGTERM)
        if len(self._signals) > 1 or time.monotonic() > self._kill_at:
            for child in self._children():
                child.kill()

    def _end_lighthouse(self) -> None:
        if self._lighthouse is None:
            return
        self._lighthouse.signal(signal.SIGTERM)
        until = time.monotonic() + _LIGHTHOUSE_SECONDS
        while self._lighthouse.is_running and time.monotonic() < until and len(self._signals) < 2:
            self._pass_on_output()
            self._lighthouse.has_ended()

    def _conclude(self) -> int:
        """Print what has become of the workers; return the exit code."""
        failed = [worker for worker in self._workers if worker.exit_code != 0]
        if not self._workers:
            why = "" if self._stopped_by else " The lighthouse has not started (see above)."
            self._say(f"no worker was started.{why}")
        elif failed:
            self._say(f"{len(failed)} of {len(self._workers)} workers have failed.")
        else:
            self._say(f"all {len(self._workers)} workers have ended with exit code 0.")
        for worker in self._workers:
            is_told = worker.exit_code != 0 and worker.last_error and self._stopped_by is None
            said = f" ({worker.last_error})" if is_told else ""
            self._outputs[1].say(f"  {worker.name}: {worker.restarts} restarts, {ending_of(worker.exit_code)}{said}")
        if self._stopped_by is not None:
            return 128 + self._stopped_by
        if not self._workers:
            return 2
        return 1 if failed else 0

    def _say(self, text: str) -> None:
        self._outputs[1].say(f"adpsgd elastic: {text}")


def ending_of(exit_code: int | None) -> str:
    """How a process has ended, in words."""
    if exit_code is None:
        return "not started"
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"


@contextlib.contextmanager
def _handled(note: Callable[[int], None]) -> Iterator[None]:
    """Note signals that ask for an end, unless they are ignored, as under nohup."""
    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    before = {number: signal.signal(number, lambda received, frame: note(received)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
