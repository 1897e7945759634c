"""Processes that take orders, one per rank; they start once, as importing torch and Lightning takes seconds.

    with hosts(2) as cluster, ranks(cluster, 1, "benchmarks.link") as started:
        answers = started.run({"contender": "ddp"})

Orders and answers pass through pipes, so none of this crosses the network between the hosts. What a rank prints goes
to a log, the end of which is part of the message if the rank fails. See `rank.py` for the other side.
"""

import contextlib
import json
import os
import queue
import random
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.frame.errors import HostsUnavailableError, RankFailedError
from benchmarks.frame.hosts import INTERFACE, Host, hosts
from benchmarks.frame.rank import ADDRESS, LOOPBACK, LOOPBACK_INTERFACE

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 1800  # without an answer from any rank
_PORTS = range(20000, 30000, 10)  # below those that Linux gives to clients; some contenders need several


class ThisMachine(Host):
    """This machine in place of a host; it needs neither root nor Linux."""

    def __init__(self) -> None:
        super().__init__("this machine", LOOPBACK)
        self.interface = LOOPBACK_INTERFACE

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line itself."""
        return list(arguments)

    def enter(self) -> None:
        """Do nothing: the calling process is there."""

    def _plug(self, state: str) -> None:
        raise HostsUnavailableError("This machine cannot be cut off from itself.")


@contextmanager
def this_machine() -> Iterator[list[Host]]:
    """This machine as a cluster of one host; what was started on it ends with the context."""
    machine = ThisMachine()
    try:
        yield [machine]
    finally:
        machine.stop()


def free_port() -> int:
    """A port that is not in use, below those that Linux picks for connections by itself (from 32768 on)."""
    while True:
        port = random.SystemRandom().randrange(16384, 32768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port


class Ranks:
    """All ranks.

    Args:
        processes: one per rank, in order, with pipes as standard input and output.
        logs: the file that each prints to.
        ports: one for each order in turn; free ones of this machine by default.
    """

    def __init__(
        self, processes: Sequence["subprocess.Popen[str]"], logs: Sequence[Path], ports: Iterator[int] | None = None
    ) -> None:
        self._processes = processes
        self._logs = logs
        self._ports = iter(free_port, None) if ports is None else ports
        self._lines: queue.Queue[tuple[int, str]] = queue.Queue()
        for rank in range(len(processes)):
            threading.Thread(target=self._listen, args=(rank,), daemon=True).start()

    def run(self, order: dict[str, Any]) -> list[Any]:
        """Tell all ranks to carry out an order.

        Returns:
            The answer of each, in order of rank.

        Raises:
            RankFailedError: if a rank fails, ends or does not answer. The others may then be waiting for it forever, so
                give no more orders.
        """
        self._tell({**order, "port": next(self._ports)})
        results: dict[int, Any] = {}
        waiting: set[int] = set()
        while len(results) < len(self._processes):
            rank, answer = self._next_answer(set(range(len(self._processes))) - set(results) - waiting)
            if "error" in answer:
                raise RankFailedError(f"Rank {rank} could not carry out {order}:\n{answer['error']}")
            if "result" in answer:
                results[rank] = answer["result"]
                continue
            waiting.add(rank)
            if len(waiting) == len(self._processes):
                waiting.clear()
                self._tell({"go": True})
        return [results[rank] for rank in sorted(results)]

    def _tell(self, message: dict[str, Any]) -> None:
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):  # a process that has ended is noticed when it does not answer
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()

    def _next_answer(self, awaited: set[int]) -> tuple[int, dict[str, Any]]:
        try:
            rank, line = self._lines.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            named = ", ".join(map(str, sorted(awaited)))
            raise RankFailedError(f"No answer from rank(s) {named} within {PATIENCE_SECONDS} s.") from None
        if line:
            return rank, json.loads(line)
        code = self._processes[rank].wait()
        end = "\n".join(self._logs[rank].read_text(errors="replace").splitlines()[-30:])
        raise RankFailedError(f"Rank {rank} ended with exit code {code}. The last lines it printed:\n{end}")

    def _listen(self, rank: int) -> None:
        for line in self._processes[rank].stdout:
            self._lines.put((rank, line))
        self._lines.put((rank, ""))


@contextmanager
def ranks(cluster: Sequence[Host], per_host: int, module: str) -> Iterator[Ranks]:
    """Start the ranks, with torchrun's environment variables; they end when the hosts are removed.

    Args:
        cluster: the hosts; ranks 0 to ``per_host`` - 1 are on the first, and so on.
        per_host: ranks per host.
        module: the name of a module with a function ``carry_out``, see `rank.py`.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes, logs = [], []
        for rank in range(len(cluster) * per_host):
            logs.append(Path(folder) / f"{rank}.log")
            with open(logs[-1], "wb") as log:
                processes.append(
                    cluster[rank // per_host].start(
                        [sys.executable, "-m", "benchmarks.frame.rank", module],
                        env={**os.environ, **_announcement(cluster, per_host, rank)},
                        cwd=REPOSITORY,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                )
        yield Ranks(processes, logs, None if cluster[0].address == LOOPBACK else iter(_PORTS))


@contextmanager
def local_ranks(count: int, module: str) -> Iterator[Ranks]:
    """Ranks on this machine, which communicate over loopback; otherwise like :func:`ranks`."""
    with this_machine() as cluster, ranks(cluster, count, module) as started:
        yield started


@contextmanager
def linked_ranks(count: int, rate_mbit: float | None, module: str) -> Iterator[Ranks]:
    """Ranks on one host each, with links of a given rate; without a rate, on this machine."""
    with ExitStack() as stack:
        if rate_mbit is None:
            yield stack.enter_context(local_ranks(count, module))
        else:
            cluster = stack.enter_context(hosts(count, rate_mbit=rate_mbit))
            yield stack.enter_context(ranks(cluster, 1, module))


def _announcement(cluster: Sequence[Host], per_host: int, rank: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": cluster[0].address,
        "WORLD_SIZE": str(len(cluster) * per_host),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_host),
        "LOCAL_WORLD_SIZE": str(per_host),
        "GROUP_RANK": str(rank // per_host),
        "NODE_RANK": str(rank // per_host),
        "TORCHELASTIC_RUN_ID": "benchmarks",  # tells Lightning that it runs under torchrun
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",  # as torchrun does: ranks share this machine's cores
        ADDRESS: cluster[rank // per_host].address,
    }
