"""How long something holds training up, on whatever device trains."""

import time

import torch


class Stopwatch:
    """Runs from when it is made until :meth:`stop`.

    On a CPU it goes by the clock. On CUDA it goes by two events in the current stream, so that the time is that of the
    device, and nobody waits for it before :attr:`seconds` is asked for.

    Args:
        device: what trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = 0.0
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
        else:
            self._seconds = time.perf_counter() - self._began_at

    @property
    def seconds(self) -> float:
        """How long it ran; on CUDA, waits until the device has come to where it was stopped."""
        if self._on_cuda:
            self._ended.synchronize()
            return float(self._began.elapsed_time(self._ended)) / 1e3
        return self._seconds
