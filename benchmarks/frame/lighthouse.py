"""torchft's lighthouse, at which elastic workers meet, in a process of its own."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch.multiprocessing as mp

from benchmarks.frame.errors import NotMeasuredError

CONTEXT = mp.get_context("forkserver")


@contextmanager
def lighthouse(heartbeat_ms: int, min_workers: int = 2) -> Iterator[str]:
    """Serve a lighthouse on this machine, and yield its address; it is killed at the end.

    Args:
        heartbeat_ms: without a heartbeat for this long, a worker is dead.
        min_workers: with fewer there is no quorum.

    Raises:
        NotMeasuredError: if it does not start.
    """
    mine, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_serve, args=(theirs, heartbeat_ms, min_workers))
    process.start()
    theirs.close()
    try:
        try:
            address = f"http://localhost:{mine.recv()}"
        except EOFError:
            raise NotMeasuredError(
                "The lighthouse did not start. Is torchft installed? pip install -e '.[elastic]'"
            ) from None
        yield address
    finally:
        process.kill()
        process.join()


def new_server(heartbeat_ms: int, min_workers: int = 2, port: int = 0) -> Any:
    """Serve a lighthouse in this process, which may serve no other one later; port 0: one that is free."""
    from torchft.coordination import LighthouseServer

    return LighthouseServer(
        bind=f"[::]:{port}",
        min_replicas=min_workers,
        join_timeout_ms=10_000,
        quorum_tick_ms=20,
        heartbeat_timeout_ms=heartbeat_ms,
    )


def _serve(pipe: Connection, heartbeat_ms: int, min_workers: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it logs each request
    server = new_server(heartbeat_ms, min_workers)
    pipe.send(int(server.address().rpartition(":")[2]))
    signal.pause()
