"""Measures how long something holds up training, on a CPU or a GPU."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Runs from its construction until :meth:`stop`.

    On a CPU it reads the clock. On CUDA it records two events in the current stream: it measures the device's time, and
    the host waits only when :attr:`seconds` is read.

    Args:
        device: the device that trains.
        wait_for: waits until the device reaches an event that was recorded at a ``time.monotonic()``; None: wait for as
            long as it takes.
    """

    def __init__(self, device: torch.device, wait_for: Callable[[Any, float], None] | None = None) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._wait_for = wait_for
        if self._on_cuda:
            with torch.cuda.device(device):
                self._began, self._ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._began.record()
        else:
            self._began_at = time.perf_counter()

    def stop(self) -> None:
        """Stop it."""
        if self._on_cuda:
            self._ended.record()
            self._ended_at = time.monotonic()
        else:
            self._seconds += time.perf_counter() - self._began_at

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Add the time for which the host waits, in this context, for work that was started before :meth:`stop`.

        On CUDA that time is a part of the device's time already.
        """
        self._began_at = time.perf_counter()
        yield
        if not self._on_cuda:
            self.stop()

    @property
    def seconds(self) -> float:
        """How long it ran. On CUDA, this waits until the device reaches the stop event."""
        if self._on_cuda:
            if self._wait_for is None:
                self._ended.synchronize()
            else:
                self._wait_for(self._ended, self._ended_at)
            return float(self._began.elapsed_time(self._ended)) / 1e3
        return self._seconds
