"""How long something holds training up, on whatever device trains."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Runs from when it is made until :meth:`stop`.

    On a CPU it goes by the clock. On CUDA it goes by two events in the current stream, so that the time is that of the
    device, and nobody waits for it before :attr:`seconds` is asked for.

    Args:
        device: what trains.
        wait_for: waits until the device has come to an event, which was recorded at a ``time.monotonic()``; by default,
            however long that takes.
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
        """Let it run on while the host waits for what the device has been given between start and stop.

        On CUDA that time is the device's, and counted already.
        """
        self._began_at = time.perf_counter()
        yield
        if not self._on_cuda:
            self.stop()

    @property
    def seconds(self) -> float:
        """How long it ran; on CUDA, waits until the device has come to where it was stopped."""
        if self._on_cuda:
            if self._wait_for is None:
                self._ended.synchronize()
            else:
                self._wait_for(self._ended, self._ended_at)
            return float(self._began.elapsed_time(self._ended)) / 1e3
        return self._seconds
