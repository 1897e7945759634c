"""The workers and what passes between them: the one place that calls torch.distributed, and that counts bytes."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Reduction:
    """A mean over the workers that is under way; ``wait`` returns the buffer that then holds it."""

    def __init__(self, buffer: Tensor, work: "dist.Work | None") -> None:
        self._buffer = buffer
        self._work = work

    def wait(self) -> Tensor:
        """Wait until the buffer holds the mean (on CUDA: until the current stream may use it)."""
        if self._work is not None:
            self._work.wait()
        return self._buffer


class Workers:
    """The workers whose replicas are averaged, one per rank of a process group.

    Without an initialized process group there is one worker, and nothing is ever sent.

    Args:
        group: the process group; None is the default group.
        device: where small tensors are made; with NCCL it has to be this rank's GPU.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None, device: torch.device | str = "cpu") -> None:
        self._group = group
        self._device = torch.device(device)
        connected = dist.is_available() and dist.is_initialized()
        self.size: int = dist.get_world_size(group) if connected else 1
        self.rank: int = dist.get_rank(group) if connected else 0
        self.payload_bytes = 0
        """Bytes of all tensors that this rank has put into collectives since the start."""

    def mean_(self, buffer: Tensor) -> Reduction:
        """Begin to replace ``buffer`` (contiguous, fp32 or fp64) by its mean over the workers."""
        if self.size == 1:
            return Reduction(buffer, None)
        # Dividing first keeps the sum within the range of the workers' own values: it cannot overflow.
        buffer.div_(self.size)
        return Reduction(buffer, self._all_reduce(buffer))

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the workers of a small vector, as float64 on the CPU."""
        buffer = values.to(self._device, torch.float64, copy=True)
        return self.mean_(buffer).wait().cpu()

    def table(self, row: Sequence[float]) -> Tensor:
        """Every worker's ``row``, as a float64 tensor of shape (workers, len(row)) on the CPU.

        Integers up to 2⁵³ arrive as they were sent.
        """
        table = torch.zeros(self.size, len(row), dtype=torch.float64, device=self._device)
        table[self.rank] = torch.tensor(row, dtype=torch.float64)
        if self.size > 1:
            # An all-reduce in which everybody else adds zeros: every backend has it, and it costs what the ring costs.
            work = self._all_reduce(table)
            if work is not None:
                work.wait()
        return table.cpu()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every worker's ``value``, in order of rank. For error messages; not counted as payload."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` with those of the first worker."""
        if self.size == 1:
            return
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        for tensor in tensors:
            buffer = tensor.data.contiguous()
            self._count(buffer)
            dist.broadcast(buffer, source, group=self._group)
            tensor.data.copy_(buffer)

    def _all_reduce(self, tensor: Tensor) -> "dist.Work | None":
        self._count(tensor)
        return dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self._group, async_op=True)

    def _count(self, tensor: Tensor) -> None:
        self.payload_bytes += tensor.numel() * tensor.element_size()
