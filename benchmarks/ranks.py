"""Processes on several hosts that take orders: one per rank, started once, as importing torch and Lightning takes long.

    with hosts(2) as cluster, ranks(cluster, 1, ["-m", "benchmarks.link", "--rank-process"]) as started:
        answers = started.run({"contender": "ddp"})

Each process calls :func:`serve`. Orders reach it, one JSON object per line, at its standard input, and answers leave it
by its standard output; whatever else it prints goes to a log, of which an error shows the end. Nothing of this crosses
the network between the hosts.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.hosts import INTERFACE, Host

REPOSITORY = Path(__file__).resolve().parents[1]
PATIENCE_SECONDS = 1800  # without a word from any rank
ADDRESS = "HOST_ADDRESS"
"""The environment variable that tells a rank the address of its host."""

_FIRST_PORT = 20000  # below those that Linux gives to clients


class RankFailedError(RuntimeError):
    """A rank could not carry out an order, or has ended."""


class Ranks:
    """All ranks, as the process sees them that gives the orders.

    Args:
        processes: one per rank, in order, with pipes as standard input and output.
        logs: where each of them prints.
    """

    def __init__(self, processes: Sequence["subprocess.Popen[str]"], logs: Sequence[Path]) -> None:
        self._processes = processes
        self._logs = logs
        self._ports = iter(range(_FIRST_PORT, 30000, 10))
        self._lines: queue.Queue[tuple[int, str]] = queue.Queue()
        for rank in range(len(processes)):
            threading.Thread(target=self._listen, args=(rank,), daemon=True).start()

    def run(self, order: dict[str, Any]) -> list[Any]:
        """Have all ranks carry out an order, with a port that was not in use before.

        Returns:
            What each of them answers, in order of rank.

        Raises:
            RankFailedError: if one fails or ends, or if nobody answers for half an hour. The others may then wait for
                it for ever: give no more orders.
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
            with contextlib.suppress(BrokenPipeError):  # one that has ended is found out when it does not answer
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()

    def _next_answer(self, awaited: set[int]) -> tuple[int, dict[str, Any]]:
        try:
            rank, line = self._lines.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            named = ", ".join(map(str, sorted(awaited)))
            raise RankFailedError(f"No word from rank(s) {named} for {PATIENCE_SECONDS} s.") from None
        if line:
            return rank, json.loads(line)
        code = self._processes[rank].wait()
        end = "\n".join(self._logs[rank].read_text(errors="replace").splitlines()[-30:])
        raise RankFailedError(f"Rank {rank} ended with exit code {code}. It printed last:\n{end}")

    def _listen(self, rank: int) -> None:
        for line in self._processes[rank].stdout:
            self._lines.put((rank, line))
        self._lines.put((rank, ""))


@contextmanager
def ranks(cluster: Sequence[Host], per_host: int, arguments: Sequence[str]) -> Iterator[Ranks]:
    """Start the ranks, announced as torchrun does; the hosts, which kill what runs on them, end them.

    Args:
        cluster: the hosts; ranks 0 to ``per_host`` - 1 are on the first one, and so on.
        per_host: ranks per host.
        arguments: what follows ``python`` on the command line.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes, logs = [], []
        for rank in range(len(cluster) * per_host):
            logs.append(Path(folder) / f"{rank}.log")
            with open(logs[-1], "wb") as log:
                processes.append(
                    cluster[rank // per_host].start(
                        [sys.executable, *arguments],
                        env={**os.environ, **_announcement(cluster, per_host, rank)},
                        cwd=REPOSITORY,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        text=True,
                    )
                )
        yield Ranks(processes, logs)


def _announcement(cluster: Sequence[Host], per_host: int, rank: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": cluster[0].address,
        "WORLD_SIZE": str(len(cluster) * per_host),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_host),
        "LOCAL_WORLD_SIZE": str(per_host),
        "GROUP_RANK": str(rank // per_host),
        "NODE_RANK": str(rank // per_host),
        "TORCHELASTIC_RUN_ID": "benchmarks",  # by this Lightning knows torchrun
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "OMP_NUM_THREADS": "1",  # as torchrun does: ranks share this machine's cores
        ADDRESS: cluster[rank // per_host].address,
    }


# On each rank


class Parent:
    """The process that gives the orders, as a rank sees it.

    While there is one, whatever this process prints goes to its log.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def orders(self) -> Iterator[dict[str, Any]]:
        """The orders, until there will be no more."""
        for line in sys.stdin:
            yield json.loads(line)

    def answer(self, kind: str, content: Any) -> None:
        """Answer with a "result" or an "error"."""
        self._answers.write(json.dumps({kind: content}) + "\n")
        self._answers.flush()

    def meet(self) -> None:
        """Wait until all ranks have come here."""
        self.answer("meet", True)
        if not sys.stdin.readline():
            raise SystemExit("The process that gives the orders has ended.")


def serve(carry_out: Callable[[dict[str, Any], Parent], Any]) -> None:
    """Carry out orders until there are no more.

    Args:
        carry_out: is given an order and the parent, and returns what can be written as JSON. ``MASTER_PORT`` is set to
            a port that nobody uses, as are the nine above it.
    """
    parent = Parent()
    for order in parent.orders():
        os.environ["MASTER_PORT"] = str(order["port"])
        try:
            result = carry_out(order, parent)
        except Exception:
            parent.answer("error", traceback.format_exc())
        else:
            parent.answer("result", result)
