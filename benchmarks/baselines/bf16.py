"""DDP that sends gradients in bf16, and counts them: half of the bytes of full communication."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook

from benchmarks.baselines.hooked import CountedDDP
from lightning_adpsgd.rounds.record import ring_bytes

BYTES = 2  # of a bf16 number


class BF16Reducer:
    """PyTorch's own hook, counted."""

    def __init__(self) -> None:
        self.steps = 0  # reductions of all gradients
        self.sent_bytes = 0  # in a ring, by this rank

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP's communication hook."""
        self.steps += bucket.is_last()
        self.sent_bytes += ring_bytes(BYTES * bucket.buffer().numel(), dist.get_world_size())
        return bf16_compress_hook(dist.group.WORLD, bucket)


class BF16Strategy(CountedDDP):
    """DDP whose gradients are sent and summed in bf16.

    Args:
        options: of ``DDPStrategy``, ``bucket_cap_mb`` and ``process_group_backend`` for example.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(BF16Reducer(), **options)
