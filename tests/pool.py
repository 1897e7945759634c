"""Several real processes that run a test's function side by side, kept alive from test to test.

Importing torch and Lightning takes seconds; forking a process that has done so, or handing a function to one that is
already there, takes milliseconds. Functions have to be defined at the top of a test's module.
"""

import contextlib
import gc
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.frame.ranks import free_port

COLLECTIVE_TIMEOUT = timedelta(seconds=60)
SECONDS_TO_CLOSE = 2.0
CLOSED = "closed"
PRELOADED = ["tests.faults.job"]
"""What forked processes have imported; the same for all tests, as they are forked from one process."""


class Outcome(NamedTuple):
    """What a function returned or raised on one rank."""

    value: Any
    error: str | None
    kind: str | None  # name of the exception's class


class WorkerPool:
    """Processes that wait for functions to run."""

    def __init__(self) -> None:
        # Forked from a process that has imported everything: importing it each time would take most of the time.
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._processes: list[Any] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, workers: int = 2) -> list[Any]:
        """What ``function(*args)`` returns on each rank of a gloo process group."""
        return _values(self._run(function, args, workers, connect=True))

    def run_trainer(self, function: Callable[..., Any], *args: Any, workers: int = 2) -> list[Any]:
        """The same, but the ranks are only announced as torchrun does; Lightning connects them."""
        return _values(self._run(function, args, workers, connect=False))

    def outcomes(self, function: Callable[..., Any], *args: Any, workers: int = 2, trainer: bool = False) -> list:
        """What ``function(*args)`` returned or raised on each rank."""
        return self._run(function, args, workers, connect=not trainer)

    def close(self) -> None:
        """End all processes."""
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
        self._processes, self._connections = [], []

    def _run(self, function: Callable[..., Any], args: tuple, workers: int, connect: bool) -> list[Outcome]:
        while len(self._processes) < workers:
            self._start_one()
        port = free_port()
        for rank in range(workers):
            self._connections[rank].send((function, args, rank, workers, port, connect))
        outcomes = self._received(function, workers, timeout=180)
        self._replace_those_that_are_stuck(workers)
        return [outcomes[rank] for rank in range(workers)]

    def _received(self, function: Callable[..., Any], workers: int, timeout: float) -> dict[int, Outcome]:
        outcomes: dict[int, Outcome] = {}
        waiting = {self._connections[rank]: rank for rank in range(workers)}
        while waiting:
            ready = wait(list(waiting), timeout=timeout)
            if not ready:
                self._kill()
                raise TimeoutError(f"rank(s) {sorted(waiting.values())} of {function.__name__} did not end")
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    outcomes[rank] = connection.recv()
                except EOFError:
                    self._kill()
                    raise RuntimeError(f"rank {rank} of {function.__name__} died") from None
        return outcomes

    def _replace_those_that_are_stuck(self, workers: int) -> None:
        """Where a collective was in flight when a test ended, gloo waits for its timeout before it closes."""
        deadline = time.monotonic() + SECONDS_TO_CLOSE
        for rank in range(workers):
            closed = self._connections[rank].poll(max(0.0, deadline - time.monotonic()))
            if closed and self._connections[rank].recv() == CLOSED:
                continue
            self._processes[rank].kill()
            self._processes[rank].join()
            self._processes[rank], self._connections[rank] = self._new_process()

    def _start_one(self) -> None:
        process, connection = self._new_process()
        self._processes.append(process)
        self._connections.append(connection)

    def _new_process(self) -> tuple[Any, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=False)
        process.start()
        theirs.close()
        return process, ours

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []


def _values(outcomes: list[Outcome]) -> list[Any]:
    for rank, outcome in enumerate(outcomes):
        if outcome.error is not None:
            raise AssertionError(f"on rank {rank}:\n{outcome.error}")
    return [outcome.value for outcome in outcomes]


def _serve(connection: Connection) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what has been imported is not looked through again after every function
    while (task := connection.recv()) is not None:
        function, args, rank, workers, port, connect = task
        announce(rank, workers, port, "tests")
        try:
            if connect:
                dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
            outcome = Outcome(function(*args), None, None)
        except BaseException as error:
            outcome = Outcome(None, traceback.format_exc(), type(error).__name__)
        connection.send(outcome)
        if dist.is_initialized():
            # A gloo group that is destroyed right after its last collective can wait for its own threads forever
            # (seen with torch 2.4).
            time.sleep(0.05)
            dist.destroy_process_group()
        del outcome
        gc.collect()  # otherwise groups that an error has left open would be closed during another test
        connection.send(CLOSED)
    os._exit(0)  # an interpreter with PyTorch takes seconds to shut down, and nothing is left to do


def announce(rank: int, workers: int, port: int, job: str) -> None:
    """Tell this process its rank as torchrun does."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(workers),
        LOCAL_WORLD_SIZE=str(workers),
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID=job,
    )
