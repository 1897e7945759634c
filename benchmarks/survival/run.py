"""One run: starts the lighthouse and the workers, strikes them, and notes what they tell."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.multiprocessing as mp

from benchmarks.frame.errors import NotMeasuredError
from benchmarks.frame.hosts import Host
from benchmarks.frame.sockets import listening_sockets, ports_held
from benchmarks.survival.faults import OWN_END, Draw
from benchmarks.survival.log import Fault, Log, Presence
from benchmarks.survival.process import IMPORTED_LATER, serve_lighthouse, train
from benchmarks.survival.task import Place, Setup

PATIENCE_SECONDS = 60.0
_FEWEST_HEALTHY = 2
_CONTEXT = mp.get_context("forkserver")


class Run:
    """The processes of one run; they end with the context.

    Args:
        setup: what the workers have in common.
        cluster: the lighthouse's host, and one for each worker.
        pause: seconds until a process that has ended is started again.
        away: seconds for which a worker is stopped or cut off.
    """

    def __init__(self, setup: Setup, cluster: Sequence[Host], pause: float, away: float) -> None:
        self._setup = setup
        self._cluster = cluster
        self._pause, self._away = pause, away
        self._started: list[tuple[Any, Host]] = []  # all processes, those that have ended too
        self._sockets: dict[Host, set[str]] = {}
        self.processes: dict[int, Any] = {}
        self._pipes: dict[int, Connection] = {}
        self._incarnations = dict.fromkeys(range(setup.workers), -1)
        self._present: dict[int, Presence] = {}  # of the process that a worker has now
        self._to_undo: list[tuple[float, Fault]] = []
        self._is_ending = False
        _CONTEXT.set_forkserver_preload(["benchmarks.survival.process", *IMPORTED_LATER])

    def __enter__(self) -> "Run":
        try:
            self._port = 0
            self._serve()
            for worker in range(self._setup.workers):
                self._start(worker)
            self.log = Log(time.time())
            self._wait(lambda: len(self._present) == self._setup.workers or self.log.faults != [])
            if len(self._present) < self._setup.workers:
                reason = self.log.faults[0].reason if self.log.faults else f"None within {PATIENCE_SECONDS:g} s."
                raise NotMeasuredError(f"Workers of {self._setup.contender} could not start together. {reason}")
        except BaseException:
            self.__exit__()
            raise
        self.log.began = time.time()
        return self

    def __exit__(self, *_: object) -> None:
        for process, _host in self._started:
            process.kill()
        for process, _host in self._started:
            process.join(10)

    # Faults

    def strike(self, until: Callable[[Log], bool], faults: Iterator[Draw]) -> None:
        """Do one fault after another until enough is done, undo them, and let all workers come back.

        A fault waits for as long as fewer than two other workers would be healthy, or the lighthouse is down already.
        """
        draw = next(faults)
        due = self.log.began + draw.wait_seconds
        while not until(self.log):
            self._listen(0.02)
            if time.time() >= due and self._do(draw):
                draw = next(faults)
                due = time.time() + draw.wait_seconds
        self._wait(lambda: not self._to_undo and len(self._healthy({"lighthouse"})) == self._setup.workers)

    def calm(self, seconds: float) -> None:
        """Let that time pass."""
        self._wait(lambda: time.time() >= self.log.began + seconds, seconds)

    def _do(self, draw: Draw) -> bool:
        """Do a fault if that is possible now."""
        if draw.kind == "lighthouse":
            if any(fault.kind == "lighthouse" for _, fault in self._to_undo):
                return False
            fault = self._note(Fault("lighthouse", None, time.time()), self._pause)
            self._lighthouse.kill()
            return True
        healthy = self._healthy()
        if len(healthy) <= _FEWEST_HEALTHY:
            return False
        worker = next(worker for worker in draw.order if worker in healthy)
        process = self.processes[worker]
        self._look_at_sockets(process, self._cluster[1 + worker])
        fault = self._note(Fault(draw.kind, worker, time.time()), self._pause if draw.kind == "kill" else self._away)
        if draw.kind == "kill":
            process.kill()
            self._lose(worker, fault)
        elif draw.kind == "stop":
            os.kill(process.pid, signal.SIGSTOP)
        else:
            self._cluster[1 + worker].unplug()
        return True

    def _undo(self, fault: Fault) -> None:
        if fault.kind == "lighthouse":
            self._serve()
        elif fault.kind == "stop":
            os.kill(self.processes[fault.worker].pid, signal.SIGCONT)  # type: ignore[index]
        elif fault.kind == "cut":
            self._cluster[1 + fault.worker].plug_in()  # type: ignore[operator]
        else:
            self._start(fault.worker)  # type: ignore[arg-type]
        fault.ended = time.time()

    def _note(self, fault: Fault, seconds: float) -> Fault:
        self.log.faults.append(fault)
        if not self._is_ending:
            self._to_undo.append((fault.began + seconds, fault))
        return fault

    def _healthy(self, also_since: Collection[str] = ()) -> set[int]:
        """Workers that are not struck, and had a round since they were, and since all faults of some kinds."""
        return {
            worker
            for worker, presence in self._present.items()
            if all(
                fault.ended < presence.last
                for fault in self.log.faults
                if fault.worker == worker or fault.kind in also_since
            )
        }

    # Processes

    def _serve(self) -> None:
        mine, theirs = _CONTEXT.Pipe()
        arguments = (theirs, self._cluster[0], self._port, self._setup.heartbeat_ms)
        self._lighthouse = self._new(serve_lighthouse, arguments, self._cluster[0])
        theirs.close()
        self._lighthouse_pipe = mine  # when this process ends, it closes, and the lighthouse ends
        if not mine.poll(PATIENCE_SECONDS):
            raise NotMeasuredError("The lighthouse does not answer.")
        try:
            self._port = mine.recv()
        except EOFError:
            raise NotMeasuredError(f"The lighthouse could not be started (port {self._port}).") from None

    def _start(self, worker: int) -> None:
        self._incarnations[worker] += 1
        mine, theirs = _CONTEXT.Pipe()
        address = f"http://{self._cluster[0].address}:{self._port}"
        host = self._cluster[1 + worker]
        place = Place(worker, self._incarnations[worker], host, address)
        self.processes[worker] = self._new(train, (theirs, self._setup, place), host)
        theirs.close()
        self._pipes[worker] = mine

    def _new(self, target: Callable[..., None], arguments: tuple[Any, ...], host: Host) -> Any:
        process = _CONTEXT.Process(target=target, args=arguments)
        process.start()
        self._started.append((process, host))
        return process

    def _lose(self, worker: int, fault: Fault) -> None:
        """The worker's process has ended: note what it has told before."""
        pipe = self._pipes.pop(worker)
        with contextlib.suppress(EOFError, ConnectionResetError):
            while pipe.poll():
                self._hear(worker, *pipe.recv())
        pipe.close()
        presence = self._present.pop(worker, None)
        if presence is not None:
            presence.last = fault.began

    # What they tell

    def _wait(self, condition: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            self._listen(0.02)

    def _listen(self, seconds: float) -> None:
        """Note what workers tell in that time, and undo the faults that are over."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            workers = {pipe: worker for worker, pipe in self._pipes.items()}
            if not workers:
                time.sleep(left)
            for pipe in wait([*workers], timeout=left) if workers else ():
                worker = workers[pipe]  # type: ignore[index]
                try:
                    self._hear(worker, *pipe.recv())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    self.processes[worker].join(1)
                    self._note_own_end(worker, f"exit code {self.processes[worker].exitcode}")
        for due, fault in list(self._to_undo):
            if time.time() >= due:
                self._to_undo.remove((due, fault))
                self._undo(fault)

    def _note_own_end(self, worker: int, reason: str) -> None:
        if worker in self._pipes:
            fault = self._note(Fault(OWN_END, worker, time.time(), reason=reason), self._pause)
            self._lose(worker, fault)

    def _hear(self, worker: int, kind: str, when: float, steps: int, value: Any) -> None:
        if kind == "failed":
            self._note_own_end(worker, value)
            return
        presence = self._present.get(worker)
        if presence is None:
            presence = self._present[worker] = Presence(worker, when, when)
            self.log.presences.append(presence)
        presence.last, presence.steps = when, steps
        if kind == "joined" and self._incarnations[worker] > 0:
            presence.start_seconds = value
        elif kind == "round":
            self.log.told.append((when, worker, value))
        elif kind == "ended":
            self.log.losses.append(value)

    # The end

    def end(self) -> Log:
        """Let the workers average, end all processes, and look for what is left."""
        latest = max((number for _, _, number in self.log.told), default=0)
        self._to_undo.clear()  # nobody is started again
        self._is_ending = True
        self.log.ended = time.time()
        for pipe in self._pipes.values():
            pipe.send(latest)
        self._wait(lambda: len(self.log.losses) >= len(self._pipes))
        for process, host in self._started:
            self._look_at_sockets(process, host)
        for pipe in self._pipes.values():
            with contextlib.suppress(BrokenPipeError):
                pipe.send("close")
        self._lighthouse.kill()
        for process, _ in self._started:
            process.join(10)
        self.log.processes_left = sum(process.is_alive() for process, _ in self._started)
        self.log.ports_left = [port for host, sockets in self._sockets.items() for port in ports_held(host, sockets)]
        return self.log

    def _look_at_sockets(self, process: Any, host: Host) -> None:
        if process.pid is not None and process.exitcode is None:
            self._sockets.setdefault(host, set()).update(listening_sockets(process.pid))
