"""Reductions in flight, and how long to wait for them."""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

TensorOp = Callable[[Tensor], Tensor]

# torch 2.14 has renamed it, and warns of the former name.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

_SECONDS_BETWEEN_CHECKS = 1.0
_SECONDS_OF_GRACE = 2.0


class CollectiveError(RuntimeError):
    """A collective failed or timed out: a worker is gone, or never joined."""


@contextlib.contextmanager
def collective() -> Iterator[None]:
    """Raise ``CollectiveError`` in place of torch's errors, except those of this rank's own device."""
    try:
        yield
    except RuntimeError as error:
        as_it_is = (CollectiveError, torch.OutOfMemoryError, getattr(torch, "AcceleratorError", CollectiveError))
        if isinstance(error, as_it_is) or str(error).startswith("CUDA error"):
            raise
        raise CollectiveError(str(error).splitlines()[0]) from error


def backend_of(device: torch.device, group: "dist.ProcessGroup | None" = None) -> str:
    """The backend for a device's tensors. A group may have several, which ``get_backend`` does not tell apart."""
    return dict(pair.split(":") for pair in dist.get_backend_config(group).split(",")).get(device.type, "")


class Reduction:
    """A reduction in flight. ``wait`` returns its result: the buffer, or what ``finish`` returns for it."""

    def __init__(self, buffer: Tensor, work: Any, finish: TensorOp | None = None) -> None:
        self._buffer, self._work, self._finish = buffer, work, finish

    def advance(self) -> None:
        """Start the second phase, if there is one; waits for the first."""

    def advance_if_ready(self) -> bool:
        """Start the second phase if the first has ended; return whether no phase is left to start. Never raises."""
        return True

    def wait(self) -> Tensor:
        """Wait for the result (on CUDA: until the current stream may use it), or raise ``CollectiveError``."""
        # A connection stays open as long as its work object is referenced, and a traceback may reference self.
        work, self._work = self._work, None
        try:
            with collective():
                if work is not None:
                    work.wait()
                if self._finish is not None:
                    self._buffer, self._finish = self._finish(self._buffer), None
        finally:
            del work
        return self._buffer


class Exchange(Reduction):
    """The two phases of ``WorkerGroup.exchange``: ranks exchange rows, then gather the combined shares."""

    def __init__(self, rows: Tensor, combine: TensorOp, group: Any, finish: TensorOp = lambda result: result) -> None:
        self._device, self._combine, self._group, self._finish_on_device = rows.device, combine, group, finish
        # gloo exchanges host tensors only. The tensor has to stay alive until the exchange has ended.
        self._sent: Tensor | None = rows.cpu() if backend_of(rows.device, group) == "gloo" else rows
        received = torch.empty_like(self._sent)
        with collective():
            work = dist.all_to_all_single(received, self._sent, group=group, async_op=True)
        super().__init__(received, work)
        self._failed: str | None = None  # the error of advance_if_ready, to be raised later

    @override
    def advance(self) -> None:
        if self._failed is not None:
            raise CollectiveError(self._failed)
        if self._sent is None:
            return
        received = super().wait()
        self._sent = None
        self._combined = self._combine(received.to(self._device)).to(received.device)
        self._buffer = received.new_empty(len(received), len(self._combined))
        with collective():
            flat = self._buffer.view(-1)
            self._work = getattr(dist, ALL_GATHER)(flat, self._combined, group=self._group, async_op=True)
        device, finish = self._device, self._finish_on_device
        self._finish = lambda gathered: finish(gathered.to(device))

    @override
    def advance_if_ready(self) -> bool:
        if self._sent is not None and self._failed is None and self._work.is_completed():
            try:
                self.advance()
            except CollectiveError as error:
                self._failed = str(error)
        return self._sent is None

    @override
    def wait(self) -> Tensor:
        self.advance()
        return super().wait()


class Patience(NamedTuple):
    """How long to wait for this rank's device to finish a collective.

    With NCCL, waiting for a collective only orders streams: if a worker is gone, the device never finishes.
    """

    seconds: float  # limit for a collective
    failed: Callable[[], str | None]  # says which rank has failed, if any; called about once per second
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def wait_for(self, event: Any, begun: float) -> None:
        """Wait until the device reaches an ``event`` recorded after a collective that was ``begun`` at that time.

        Raises:
            CollectiveError: if a worker has failed or the time is up. This rank's own errors are not translated.
        """
        now = started = self.clock()
        check_at = started + _SECONDS_BETWEEN_CHECKS
        who, give_up_at = None, begun + self.seconds
        while not event.query():
            if now >= give_up_at:
                raise CollectiveError(who or f"it has not ended after {now - begun:.0f} s")
            if who is None and now >= check_at:
                who, check_at = self.failed(), now + _SECONDS_BETWEEN_CHECKS
                # Not at once: it may have completed its part before it failed.
                give_up_at = give_up_at if who is None else min(give_up_at, now + _SECONDS_OF_GRACE)
            self.sleep(min(1e-3, (now - started) / 16))
            now = self.clock()


def on_host(numbers: Tensor, work: Any, patience: Patience) -> Reduction:
    """Copy the result of a small reduction to the host; on CUDA, in a separate stream."""
    if numbers.device.type != "cuda":
        return Reduction(numbers, work, Tensor.cpu)
    begun, side = patience.clock(), _side_stream(numbers.device)
    side.wait_stream(torch.cuda.current_stream(numbers.device))
    with torch.cuda.stream(side):
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(Reduction(numbers, work).wait(), non_blocking=True)
        numbers.record_stream(side)
        copied = side.record_event()

    def arrived(host: Tensor) -> Tensor:
        patience.wait_for(copied, begun)
        return host

    return Reduction(host, None, arrived)


@functools.cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


def on_device(entries: "Sequence[float | Tensor]", device: torch.device) -> Tensor:
    """Numbers and tensors of one element as a float64 tensor on the device, without a device sync."""
    known = [0.0 if isinstance(entry, Tensor) else float(entry) for entry in entries]
    # Safe: torch does not reuse pinned memory before the device has copied it.
    row = torch.tensor(known, dtype=torch.float64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    for place, entry in enumerate(entries):
        if isinstance(entry, Tensor):
            row[place] = entry.detach()
    return row
