"""Advances reductions during the backward pass, which takes most of a step."""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_adpsgd.rounds.pipeline import Pipeline

_TIMES = 16  # checks per backward pass


def advance_in_backward(optimizer: Optimizer, pipeline: Pipeline) -> None:
    """Start the second phase of a reduction as soon as the first has ended, while gradients are computed.

    Otherwise the second phase would start only when the result is needed, and the network would idle until then.

    Workers start it at different times, but have to start all phases in the same order. So at most one fragment may be
    in flight. On CPU only: NCCL needs one order for all groups of a device, and there may be other communication in the
    backward pass.

    Args:
        optimizer: hooks on the gradients of some of its parameters check the reductions.
        pipeline: has the reductions; hooks are removed with it.
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
