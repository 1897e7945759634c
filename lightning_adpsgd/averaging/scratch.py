"""Reuses the buffers that buckets are packed into."""

import torch
from torch import Tensor

from lightning_adpsgd.averaging.layout import Bucket, FlatLayout


class BufferPool:
    """Lends buffers for the buckets of a layout, and reuses those that are given back.

    Args:
        layout: of the buckets.
        device: where CPU tensors are packed.
        keeps: whether to keep buffers between rounds. On the CPU, new memory is slow to get; a GPU's allocator is fast.
    """

    def __init__(self, layout: FlatLayout, device: torch.device, keeps: bool) -> None:
        self._layout, self._device, self._keeps = layout, device, keeps
        self._spare: list[Tensor] = []

    def lend(self, bucket: Bucket) -> Tensor:
        """A spare buffer that fits the bucket, or a new one."""
        while self._spare:
            buffer = self._spare.pop()
            if self._layout.fits(bucket, buffer, self._device):
                return buffer
        return self._layout.new_buffer(bucket, self._device)

    def give_back(self, *buffers: Tensor) -> None:
        """Take back what was lent."""
        self._spare += buffers

    def end_round(self) -> None:
        """Free the spare buffers, unless they are kept."""
        if not self._keeps:
            self._spare.clear()
