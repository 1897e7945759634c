"""Buffers that buckets are packed into, used again."""

import torch
from torch import Tensor

from lightning_adpsgd.averaging.layout import Bucket, FlatLayout


class BufferPool:
    """Lends buffers for the buckets of a layout. Those that are given back are kept if ``keeps``, for the next round.

    Args:
        layout: of the buckets.
        device: where CPU tensors are packed.
        keeps: whether to keep buffers between rounds: a system takes its time to hand out memory, an allocator of a
            device does not.
    """

    def __init__(self, layout: FlatLayout, device: torch.device, keeps: bool) -> None:
        self._layout, self._device, self._keeps = layout, device, keeps
        self._spare: list[Tensor] = []

    def lend(self, bucket: Bucket) -> Tensor:
        """A spare buffer that fits, or a new one: two of the longest bucket are enough."""
        while self._spare:
            buffer = self._spare.pop()
            if self._layout.fits(bucket, buffer, self._device):
                return buffer
        return self._layout.new_buffer(bucket, self._device)

    def give_back(self, *buffers: Tensor) -> None:
        """Take back what was lent."""
        self._spare += buffers

    def end_round(self) -> None:
        """Forget the buffers that are not kept."""
        if not self._keeps:
            self._spare.clear()
