"""A device that is measured: its clock and its memory."""

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    """When something ran."""

    began: float  # in seconds, on a clock that all processes of this machine share
    ended: float
    cpu_seconds: float  # processor time of all threads of this process
    device_seconds: float | None  # between two events in the device's queue; None on a CPU

    @property
    def seconds(self) -> float:
        """Wall time."""
        return self.ended - self.began


class Extra(NamedTuple):
    """Memory that something takes beyond what was in use before."""

    host_bytes: int | None  # peak of this process; None where it cannot be measured (only Linux can)
    device_bytes: int | None  # peak of PyTorch on the accelerator; None on a CPU
    kept_bytes: int | None  # still in use afterwards, where the model is

    @property
    def bytes(self) -> int | None:
        """Peak, where the model is."""
        return self.host_bytes if self.device_bytes is None else self.device_bytes


class Device:
    """A processor or an accelerator, by PyTorch's name: ``cpu`` or ``cuda:0``."""

    def __init__(self, name: str = "cpu") -> None:
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"

    def finish(self) -> None:
        """Wait until the device is idle."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def time(self, function: Callable[[], object]) -> Timing:
        """When a function, with all work that it queued on the device, began and ended."""
        watch = Stopwatch(self)
        watch.start()
        function()
        return watch.stop()

    def extra_memory(self, function: Callable[[], object]) -> Extra:
        """The memory that a function takes at its peak, and keeps.

        Do not time anything afterwards: from now on this process returns freed memory to the system at once.
        """
        self.finish()
        if not self.is_cuda:
            peak, kept = _host_memory(function)
            return Extra(peak, None, kept)
        torch.cuda.reset_peak_memory_stats(self.torch)
        before = torch.cuda.memory_allocated(self.torch)
        peak, _ = _host_memory(lambda: (function(), self.finish()))
        after = torch.cuda.memory_allocated(self.torch)
        return Extra(peak, torch.cuda.max_memory_allocated(self.torch) - before, after - before)


class Stopwatch:
    """Measures the time between two points of a program, on host and device; it waits for the device at both."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._began = self._cpu_began = 0.0
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.is_cuda else []

    def start(self) -> None:
        """Begin."""
        self._device.finish()
        if self._events:
            self._events[0].record()
        self._cpu_began = time.process_time()
        self._began = time.perf_counter()

    def stop(self) -> Timing:
        """End."""
        if self._events:
            self._events[1].record()
        self._device.finish()
        ended = time.perf_counter()
        cpu_seconds = time.process_time() - self._cpu_began
        on_device = self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else None
        return Timing(self._began, ended, cpu_seconds, on_device)


def _host_memory(function: Callable[[], object]) -> tuple[int | None, int | None]:
    """Memory beyond what the process has now: the peak while the function runs, and afterwards."""
    if not _can_reset_peak():
        function()
        return None, None
    _return_freed_memory()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    function()
    peak = _status("VmHWM")
    _return_freed_memory()
    return max(0, peak - before), max(0, _status("VmRSS") - before)


def _can_reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmHWM") > 0
    except (OSError, StopIteration):
        return False


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _return_freed_memory() -> None:
    """Make glibc return freed buffers, which the function could otherwise reuse unnoticed; other libraries cannot."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        mmap_threshold, bytes_ = -3, 1 << 16
        libc.mallopt(mmap_threshold, bytes_)  # buffers from this size on are mapped one by one
        libc.malloc_trim(0)
