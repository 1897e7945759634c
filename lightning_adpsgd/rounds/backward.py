"""Lets reductions go on in the backward pass, where a step spends most of its time."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_adpsgd.rounds.pipeline import Pipeline

_TIMES = 16  # that reductions are looked at in a backward pass


def advance_in_backward(optimizer: Optimizer, pipeline: Pipeline) -> None:
    """Begin second phases of reductions as soon as their first has ended, while gradients are computed.

    A reduction in two phases would otherwise travel in one half of the time only: nobody waits for its first phase, but
    the second begins where the result is needed.

    When that is differs from worker to worker, but phases have to begin in the same order on all of them. So there must
    not be several fragments in flight. And this is for the CPU: NCCL wants one order for all groups of a device, and
    somebody else may communicate in the backward pass.

    Args:
        optimizer: whose parameters' gradients are computed; some of them look after reductions.
        pipeline: whose reductions; as long as it is alive.
    """
    pipeline_if_alive = weakref.ref(pipeline)

    def advance(_: Tensor) -> None:
        alive = pipeline_if_alive()
        if alive is not None:
            under_way = (bucket.reduction for fragment in alive.in_flight for bucket in fragment.buckets)
            all(reduction.advance_if_ready() for reduction in under_way)  # up to the first that is not

    parameters = [each for group in optimizer.param_groups for each in group["params"] if each.requires_grad]
    step = max(1, len(parameters) // _TIMES)
    handles = [each.register_post_accumulate_grad_hook(advance) for each in parameters[::step] if each.is_leaf]
    weakref.finalize(pipeline, _remove, handles)


def _remove(handles: Iterable[Any]) -> None:
    for handle in handles:
        handle.remove()
