"""What is measured on: ranks on this machine alone, and a device with its clock and its memory.

    with this_machine() as cluster, ranks(cluster, 2, ["-m", "benchmarks.round", "--rank-process"]) as started:
        answers = started.run({...})

In place of hosts that talk over links (see `hosts.py`), these ranks talk over loopback. That needs neither root nor
Linux.
"""

import ctypes
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from benchmarks.hosts import Host
from benchmarks.ranks import ADDRESS

LOOPBACK = "127.0.0.1"
_INTERFACE = "lo0" if sys.platform == "darwin" else "lo"


# The ranks


class ThisMachine(Host):
    """This machine as it is, in the place of a host."""

    def __init__(self) -> None:
        super().__init__("this machine", LOOPBACK)

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command line itself."""
        return list(arguments)


@contextmanager
def this_machine() -> Iterator[list[Host]]:
    """This machine as a cluster of one host; what was started on it ends with it."""
    machine = ThisMachine()
    try:
        yield [machine]
    finally:
        machine.stop()


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


@cache
def divide(group_size: int) -> int:
    """Announce to the calling rank a smaller group in place of all ranks: those next to it.

    Args:
        group_size: how many are in each group.

    Returns:
        Which group it is.
    """
    group, rank = divmod(int(os.environ["RANK"]), group_size)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(group_size), "LOCAL_WORLD_SIZE": str(group_size)}
    return group


def connect(port: int, backend: str = "gloo") -> None:
    """Connect the calling rank with the others, unless it is; it stays connected from order to order.

    Args:
        port: on which the first rank listens, free.
        backend: "gloo", or "nccl", which is told that each rank has a host of its own: it accepts no two ranks of one
            host on one GPU, but any number of hosts, whose network here is loopback.
    """
    if dist.is_initialized():
        return
    os.environ["MASTER_PORT"] = str(port)
    if os.environ.get(ADDRESS) == LOOPBACK:
        os.environ["GLOO_SOCKET_IFNAME"] = _INTERFACE
    if backend == "nccl":
        os.environ |= {
            "NCCL_HOSTID": f"rank-{os.environ['RANK']}",
            "NCCL_SOCKET_IFNAME": _INTERFACE,
            "NCCL_NET": "Socket",
            "NCCL_P2P_DISABLE": "1",
            "NCCL_SHM_DISABLE": "1",
            "NCCL_MNNVL_ENABLE": "0",
        }
    dist.init_process_group(backend, device_id=torch.device("cuda:0") if backend == "nccl" else None)


# The device


class Timing(NamedTuple):
    """When something ran."""

    began: float
    """In seconds, on the clock that all processes of this machine share."""
    ended: float
    cpu_seconds: float
    """Of all threads of this process meanwhile: what it takes from others, and not what they take from it."""
    device_seconds: float | None
    """Between two events in the device's queue; None on a CPU."""


class Extra(NamedTuple):
    """What memory something takes, beyond what was taken before."""

    host_bytes: int | None
    """At its peak, by this process; None where it cannot be known (it can on Linux)."""
    device_bytes: int | None
    """At its peak, by PyTorch on the accelerator; None on a CPU."""
    kept_bytes: int | None
    """Afterwards, where the model is."""

    @property
    def bytes(self) -> int | None:
        """At its peak, where the model is."""
        return self.host_bytes if self.device_bytes is None else self.device_bytes


class Device:
    """A processor or an accelerator that is measured.

    Args:
        name: as PyTorch has it, such as ``cpu`` or ``cuda:0``.
    """

    def __init__(self, name: str = "cpu") -> None:
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"

    def finish(self) -> None:
        """Wait until it has done all that it was given."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def time(self, function: Callable[[], object]) -> Timing:
        """When a function and all that it gave to the device began and ended."""
        watch = Stopwatch(self)
        watch.start()
        function()
        return watch.stop()

    def extra_memory(self, function: Callable[[], object]) -> Extra:
        """The memory that a function takes at its peak, and keeps.

        Nothing that is timed may follow: from here on this process hands freed memory back to the system at once.
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
    """Takes the time between two places in a program, on the host and on the device.

    Args:
        device: waited for at either place.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._began = self._cpu_began = 0.0
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.is_cuda else []

    def start(self) -> None:
        """From here."""
        self._device.finish()
        if self._events:
            self._events[0].record()
        self._cpu_began = time.process_time()
        self._began = time.perf_counter()

    def stop(self) -> Timing:
        """To here."""
        if self._events:
            self._events[1].record()
        self._device.finish()
        ended = time.perf_counter()
        cpu_seconds = time.process_time() - self._cpu_began
        on_device = self._events[0].elapsed_time(self._events[1]) / 1e3 if self._events else None
        return Timing(self._began, ended, cpu_seconds, on_device)


# Linux's account of this process


def _host_memory(function: Callable[[], object]) -> tuple[int | None, int | None]:
    """What the process takes beyond what it takes before: at most while the function runs, and afterwards."""
    if not _can_reset_peak():
        function()
        return None, None
    _hand_back_freed_memory()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what it takes now
    function()
    peak = _status("VmHWM")
    _hand_back_freed_memory()
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


def _hand_back_freed_memory() -> None:
    """Have glibc keep no freed buffers, which the function could take unseen; other libraries are left alone."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim"):
        mmap_threshold, bytes_ = -3, 1 << 16
        libc.mallopt(mmap_threshold, bytes_)  # from this size on, buffers are the system's own
        libc.malloc_trim(0)
