"""Threads that can be used at exit, when since Python 3.12 no thread can be started any more (cpython#113964)."""

import os
import queue
import threading
from collections.abc import Callable

_SPARE = 2  # the work of one may never end

_queues: "dict[int, queue.SimpleQueue[Callable[[], None]]]" = {}  # by process, since a fork copies no threads


def keep_spare_threads() -> None:
    """Start the threads that :func:`run_aside` uses at exit, once in each process."""
    if os.getpid() in _queues:
        return
    waiting = _queues[os.getpid()] = queue.SimpleQueue()
    for _ in range(_SPARE):
        threading.Thread(target=_serve, args=(waiting,), daemon=True, name="lightning_adpsgd at exit").start()


def run_aside(function: Callable[[], None]) -> threading.Event:
    """Run a function in a daemon thread, which may be a spare one.

    Returns:
        An event that is set when the function has ended.
    """
    ended = threading.Event()

    def run() -> None:
        try:
            function()
        finally:
            ended.set()

    try:
        threading.Thread(target=run, daemon=True).start()
    except RuntimeError:  # the interpreter shuts down
        if os.getpid() not in _queues:
            raise
        _queues[os.getpid()].put(run)
    return ended


def _serve(waiting: "queue.SimpleQueue[Callable[[], None]]") -> None:
    while True:
        waiting.get()()
