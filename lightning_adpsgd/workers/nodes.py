"""Nodes as workers: the ranks of a node hold the same replica, and send it once."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import Self, override

from lightning_adpsgd.validation import check_int
from lightning_adpsgd.workers.group import WorkerGroup, new_group
from lightning_adpsgd.workers.reduction import Exchange, Reduction, TensorOp


class NodeWorkerGroup(WorkerGroup):
    """Workers that are nodes: the ranks of a node hold the same replica, and send it once.

    Each rank reduces its own slice of a buffer with its counterparts on the other nodes; then the slices are gathered
    within the node. So a node sends one buffer per ring, whatever its number of ranks. Bytes within a node are not
    counted.

    Args:
        ranks_per_node: number of consecutive ranks of a node, the same for all nodes.
        device: where small tensors are created; with NCCL, this rank's GPU.

    Raises:
        TypeError: if ``ranks_per_node`` is not an int.
        ValueError: if it is less than 1, or the number of ranks is not a multiple of it.
    """

    def __init__(self, ranks_per_node: int, device: torch.device | str = "cpu") -> None:
        super().__init__(None, device)
        check_int("NodeWorkerGroup", "ranks_per_node", ranks_per_node, at_least=1)
        if self.size % ranks_per_node != 0:
            raise ValueError(
                f"NodeWorkerGroup(ranks_per_node={ranks_per_node}): {self.size} ranks cannot be divided into nodes of"
                " as many. Pass the number of ranks that each node runs."
            )
        self.ranks_per_worker = ranks_per_node
        self._place = self.rank % ranks_per_node  # within the node
        self._first = self.rank - self._place
        self.open()

    def open(self) -> list[Any]:
        """The process groups of this rank's node and of its counterparts. All ranks have to call this."""
        if self.size == 1:
            return [None, None]
        if not self._opened:  # also after close(): a checkpoint's round may follow the end of training
            ranks, step = range(self.size), self.ranks_per_worker
            # Every rank has to take part in creating every group.
            nodes = [new_group([*ranks[first : first + step]], self.device) for first in ranks[::step]]
            counterparts = [new_group([*ranks[place::step]], self.device) for place in ranks[:step]]
            self._opened = [nodes[self.rank // step], counterparts[self._place]]
        return self._opened

    @property
    def ranks_per_node(self) -> int:
        """Number of consecutive ranks of a node."""
        return self.ranks_per_worker

    @property
    def node(self) -> Any:
        """The process group of this rank's node."""
        return self.open()[0]

    @override
    def new_async_group(self) -> Self:
        other = super().new_async_group()
        if other is not self:
            own, other._opened = other._opened, []
            other.open().extend(own)
        return other

    @override
    def sum_(self, buffer: Tensor) -> Reduction:
        slices = buffer.tensor_split(self.ranks_per_worker)
        mine = slices[self._place]
        work = self._all_reduce(mine, self.open()[1]) if len(mine) > 0 else None
        return Reduction(buffer, work, partial(self._gather_, slices))

    @override
    def exchange(self, rows: Tensor, combine: TensorOp, residuals: Sequence[Tensor], sizes: Sequence[int]) -> Reduction:
        step = self.ranks_per_worker
        mine = slice(self._place, None, step)

        def gather(combined: Tensor) -> Tensor:
            gathered = combined.new_empty(step, *combined.shape)
            gathered[self._place] = combined
            # The next round may assign an element to another rank of the node, which then needs its residual.
            self._gather_(residuals[self._first : self._first + step], gathered)
            return self._gather_(gathered.unbind(), gathered).transpose(0, 1).reshape(self.size, -1)

        self._counter.payload_bytes += sum(sizes[mine])
        return Exchange(rows[mine].contiguous(), combine, self.open()[1], gather)

    def _gather_(self, parts: Sequence[Tensor], whole: Tensor) -> Tensor:
        """Overwrite each part with that of the rank at its place in the node; return ``whole``."""
        sent = [(part, self._first + place) for place, part in enumerate(parts) if len(part) > 0]
        works: list[Any] = [dist.broadcast(part, rank, group=self.node, async_op=True) for part, rank in sent]
        for work in works:
            work.wait()
        return whole
