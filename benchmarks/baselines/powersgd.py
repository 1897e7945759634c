"""PowerSGD: gradients are averaged at every step, as thin matrices (Vogels et al., arXiv:1905.13727)."""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from typing_extensions import override

from benchmarks.baselines.hooked import CountedDDP
from lightning_adpsgd.rounds.record import ring_bytes
from lightning_adpsgd.validation import given, type_of

FIRST_STEP = 2  # the smallest that PyTorch allows: gradients of the steps before it are not compressed
MEGABYTE = 2**20


class PowerSGDReducer:
    """PyTorch's own hook, with error feedback and a warm start, counted.

    One-dimensional tensors, and matrices too small for compression to pay, are sent as they are; they are counted too.
    """

    def __init__(self, rank: int) -> None:
        # Configuration
        self._rank = rank

        # State
        self.steps = 0  # reductions of all gradients
        self._state: PowerSGDState | None = None  # made when processes are connected
        self._uncompressed = 0  # elements of the steps before the first one that is compressed
        self._element_size = 4

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent, in rings."""
        if self._state is None:
            return 0
        elements = self._uncompressed + self._state.total_numel_after_compression
        return ring_bytes(self._element_size * elements, dist.get_world_size())

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """DDP's communication hook."""
        if self._state is None:
            self._state = PowerSGDState(None, self._rank, start_powerSGD_iter=FIRST_STEP)
        self._element_size = bucket.buffer().element_size()
        if self._state.iter < FIRST_STEP:
            self._uncompressed += bucket.buffer().numel()
        self.steps += bucket.is_last()
        return powerSGD_hook(self._state, bucket)


class PowerSGDStrategy(CountedDDP):
    """DDP that averages low-rank approximations of its gradients (PowerSGD, arXiv:1905.13727).

    All gradients are in one bucket, unless ``bucket_cap_mb`` is given: PyTorch's hook waits for collectives in its
    callbacks, which gloo runs on two threads, so that it hangs with more buckets. A run that continues from a
    checkpoint starts with neither errors nor matrices.

    Args:
        matrix_rank: of the approximation. A larger one takes more bytes, and its error is smaller.
        options: of ``DDPStrategy``, ``process_group_backend`` for example.

    Raises:
        ValueError: if ``matrix_rank`` is not an int of at least 1.
    """

    def __init__(self, matrix_rank: int = 2, **options: Any) -> None:
        if isinstance(matrix_rank, bool) or not isinstance(matrix_rank, int) or matrix_rank < 1:
            raise ValueError(
                f"{given('matrix_rank', matrix_rank, 'PowerSGDStrategy')}: expected an int of at least 1, got"
                f" {type_of(matrix_rank)}. Pass for example 2."
            )
        super().__init__(PowerSGDReducer(matrix_rank), **options)

    @override
    def configure_ddp(self) -> None:
        """Register the hook, with a bucket that holds all gradients."""
        assert self.model is not None
        total = sum(each.numel() * each.element_size() for each in self.model.parameters())
        self._ddp_kwargs.setdefault("bucket_cap_mb", 1 + total // MEGABYTE)
        super().configure_ddp()
