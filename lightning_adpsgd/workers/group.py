"""The workers, and the collectives between them. Counts the bytes sent."""

import copy
import math
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self

from lightning_adpsgd.workers.contribution import Contribution
from lightning_adpsgd.workers.peers import ClosedGroup, Peers, close_groups, close_without_waiting
from lightning_adpsgd.workers.reduction import (
    Exchange,
    Patience,
    Reduction,
    TensorOp,
    backend_of,
    collective,
    on_device,
    on_host,
)


class WorkerGroup:
    """The workers whose replicas are averaged: one per rank, or one per node (:class:`NodeWorkerGroup`).

    Without an initialized process group there is one worker, and nothing is ever sent.

    Args:
        group: the process group; None is the default group.
        device: where small tensors are created; with NCCL, this rank's GPU.
    """

    ranks_per_worker = 1

    def __init__(self, group: "dist.ProcessGroup | None" = None, device: torch.device | str = "cpu") -> None:
        self._group: Any = group
        self.device = torch.device(device)
        self.size: int = dist.get_world_size(group) if dist.is_initialized() else 1  # ranks, not workers
        self.rank: int = dist.get_rank(group) if dist.is_initialized() else 0
        self.peers = Peers(self.rank, self.size, self.device)
        self.patience = Patience(_seconds_to_wait(self.device) if self.size > 1 else math.inf, self.peers.who_failed)
        """How long this rank waits for its device to finish a collective."""
        self._counter = SimpleNamespace(payload_bytes=0)
        self._opened: list[Any] = []  # process groups, to be closed

    @property
    def payload_bytes(self) -> int:
        """Bytes of all tensors that this rank has passed to collectives so far."""
        return int(self._counter.payload_bytes)

    @property
    def count(self) -> int:
        """The number of workers."""
        return self.size // self.ranks_per_worker

    def worker_of(self, rank: int) -> int:
        """The worker that a rank belongs to."""
        return rank // self.ranks_per_worker

    @property
    def all_contribute(self) -> Contribution:
        """What this worker contributes to a mean over all workers."""
        return Contribution(self.count, self.worker_of(self.rank))

    @property
    def can_share_async_group(self) -> bool:
        """Whether all optimizers may send fragments in one async group.

        Ranks that step their optimizers in different orders would reduce fragments of different sizes together. gloo
        then ends the process before the handshake finds the disagreement; NCCL leaves the host free to find it.
        """
        return self.count > 1 and backend_of(self.device, self._group) == "nccl"

    def new_async_group(self) -> Self:
        """The same workers in a separate process group; bytes are counted together. All ranks have to call this."""
        if self.size == 1:
            return self
        group = new_group([self._global_rank(rank) for rank in range(self.size)], self.device)
        other = copy.copy(self)  # counts bytes in the same place
        other._group, other._opened = group, [group]
        return other

    def close(self) -> None:
        """Close the connections that were opened for this group, without waiting for others. It is unusable then."""
        opened, self._opened = self._opened, []
        if self._group in opened:
            self._group = ClosedGroup()
        if opened:
            close_without_waiting(partial(close_groups, opened))

    def sum_(self, buffer: Tensor) -> Reduction:
        """Start to replace ``buffer`` (contiguous) by its sum over the workers."""
        return Reduction(buffer, self._all_reduce(buffer) if self.count > 1 else None)

    def shares(self, buffer: Tensor) -> list[Tensor]:
        """The part of a flat ``buffer`` that each rank combines in :meth:`exchange`; the first is the longest."""
        cut = [(part, -(-len(part) // self.count)) for part in buffer.tensor_split(self.ranks_per_worker)]
        return [part[worker * length : (worker + 1) * length] for worker in range(self.count) for part, length in cut]

    def exchange(self, rows: Tensor, combine: TensorOp, residuals: Sequence[Tensor], sizes: Sequence[int]) -> Reduction:
        """Start to reduce encoded values: each rank combines its share, and all gather the combined shares.

        Args:
            rows: the encoded :meth:`shares` of this worker's values; uint8, shape (ranks, bytes per share), contiguous.
            combine: decodes, averages and encodes this rank's share: takes what all workers have sent, uint8, shape
                (workers, bytes per share), and returns uint8, shape (bytes of a combined share,). That length is the
                same on all ranks.
            residuals: for each rank, the tensor to which its ``combine`` adds the encoding error. Once the result has
                arrived, it is the same on all ranks of a worker.
            sizes: of each row, the bytes that are not padding.

        Returns:
            The reduction; its result is uint8, shape (ranks, bytes of a combined share).
        """
        self._counter.payload_bytes += sum(sizes)
        return Exchange(rows, combine, self._group)

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` with those of rank 0."""
        for whole in (tensor.data for tensor in tensors if self.size > 1 and tensor.numel() > 0):
            mine = whole[tuple(0 if stride == 0 else slice(None) for stride in whole.stride())]  # expanded: once
            packed = mine.resolve_conj().resolve_neg().contiguous()
            self._counter.payload_bytes += packed.nbytes
            with collective():
                # As bytes: backends refuse some dtypes, such as int16 and 8-bit floats.
                dist.broadcast(packed.view(-1).view(torch.uint8), self._global_rank(0), group=self._group)
            if packed is not mine:
                mine.copy_(packed)

    def launch_mean(self, values: "Sequence[float | Tensor]", contribution: Contribution | None = None) -> Reduction:
        """Start to average a few numbers or tensors of one element over the workers that contribute."""
        contribution = contribution or self.all_contribute
        row = on_device(values, self.device)
        # Over all ranks, so that ranks of one worker also have the same bits. Not multiplied by 0: 0 · NaN is NaN.
        ranks = contribution.contributors * self.ranks_per_worker
        row = row.div_(ranks) if contribution.contributes else row.zero_()
        return on_host(row, self._all_reduce(row) if self.size > 1 else None, self.patience)

    def launch_table(self, row: "Sequence[float | Tensor]") -> Reduction:
        """Start to fill a :meth:`table`; entries may be tensors of one element."""
        table = torch.zeros(self.size, len(row), dtype=torch.float64, device=self.device)
        table[self.rank] = on_device(row, self.device)
        # An all-reduce to which other ranks add zeros: every backend has it.
        return on_host(table, self._all_reduce(table) if self.size > 1 else None, self.patience)

    def table(self, row: Sequence[float]) -> Tensor:
        """Every rank's ``row``: float64, shape (ranks, len(row)), on the CPU. Integers up to 2⁵³ are exact."""
        return self.launch_table(row).wait()

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's ``value``, for error messages; not counted as payload."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with collective():
                dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast_object(self, value: Any, source: int) -> Any:
        """The ``value`` of rank ``source``, on all ranks; not counted as payload."""
        values = [value]
        if self.size > 1:
            with collective():
                dist.broadcast_object_list(values, self._global_rank(source), group=self._group)
        return values[0]

    def _global_rank(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    def _all_reduce(self, tensor: Tensor, group: Any = None) -> Any:
        self._counter.payload_bytes += tensor.nbytes
        with collective():
            return dist.all_reduce(tensor, group=group or self._group, async_op=True)


def new_group(ranks: list[int], device: torch.device) -> Any:
    """A process group with the default group's timeout. All ranks have to call this."""
    with collective():
        return dist.new_group(ranks, timeout=_timeout(device))


def is_default(group: Any) -> bool:
    """Whether collectives in ``group`` are those of all ranks in the default process group."""
    return group is None or group is dist.group.WORLD


def _timeout(device: torch.device) -> timedelta:
    """The timeout of collectives; torch has no public way to read it."""
    return dist.distributed_c10d._get_default_group()._get_backend(device).options._timeout


def _seconds_to_wait(device: torch.device) -> float:
    """A little less than the backend's timeout, at which NCCL ends the process without a message."""
    try:
        seconds = _timeout(device).total_seconds()
    except (AttributeError, RuntimeError):  # another backend than gloo and NCCL
        return math.inf
    return seconds - min(0.1 * seconds, 5.0)
