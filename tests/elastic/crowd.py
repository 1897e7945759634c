"""Elastic workers in processes of their own, which a test commands step by step."""

import os
import re
import signal
import time
import urllib.request
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from tests.elastic import member

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.faults.job", "tests.elastic.member", "tests.elastic.trainer_member", "torchft"])


class Lighthouse:
    """torchft's lighthouse, in a process of its own: in this one it would answer even after its shutdown."""

    def __init__(self, join_timeout_ms: int = 3000, port: int = 0, min_replicas: int = 1) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        arguments = (theirs, join_timeout_ms, port, min_replicas)
        self._process = CONTEXT.Process(target=member.serve_lighthouse, args=arguments)
        self._process.start()
        self.port = self._pipe.recv()
        self.address = f"http://localhost:{self.port}"

    def wait_for_requests(self, number: int = 1, seconds: float = 60.0) -> None:
        """Wait until as many workers have asked for a quorum, and have not been given one."""
        deadline = time.monotonic() + seconds
        waiting = -1
        while waiting < number:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{waiting} workers wait at the lighthouse, not {number}")
            time.sleep(0.05)
            page = urllib.request.urlopen(f"{self.address}/status").read().decode()
            found = re.search(r"\[(\d+)/\d+ participants healthy\]", page)
            waiting = int(found.group(1)) if found else -1

    def kill(self) -> None:
        self._process.kill()
        self._process.join(10)


class Crowd:
    """Workers by their numbers; commands are given to several of them at once, and answered by each."""

    def __init__(self, address: str, target: Callable[..., None] = member.follow, **arguments: Any) -> None:
        self._address = address
        self._target = target
        self._arguments = arguments
        self.processes: dict[int, Any] = {}
        self._pipes: dict[int, Any] = {}

    def start(self, *workers: int, **arguments: Any) -> None:
        for worker in workers:
            mine, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=self._target, args=(worker, theirs, self._address), kwargs={**self._arguments, **arguments}
            )
            process.start()
            theirs.close()
            self.processes[worker], self._pipes[worker] = process, mine

    def send(self, command: Any, *workers: int) -> None:
        for worker in workers:
            self._pipes[worker].send(command)

    def receive(self, *workers: int, seconds: float = 60.0) -> dict[int, Any]:
        answers = {}
        deadline = time.monotonic() + seconds
        for worker in workers:
            if not self._pipes[worker].poll(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"worker {worker} does not answer")
            answers[worker] = self._pipes[worker].recv()
        return answers

    def do(self, command: Any, *workers: int) -> dict[int, Any]:
        self.send(command, *workers)
        return self.receive(*workers)

    def kill(self, worker: int) -> None:
        os.kill(self.processes[worker].pid, signal.SIGKILL)
        self.processes[worker].join(10)

    def end(self) -> None:
        """End the workers: those that are alive, in the normal way."""
        for worker, process in self.processes.items():
            if process.is_alive():
                self._pipes[worker].send("end")
        for process in self.processes.values():
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join(10)
