"""Finds the parameters that no optimizer trains, but that have come to differ: target networks, EMA teachers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_adpsgd.averaging.layout import Described, hash48
from lightning_adpsgd.rounds.handshake import KINDS, Handshake, RankState, naming_lost_workers
from lightning_adpsgd.rounds.record import TRIGGERS, Trigger
from lightning_adpsgd.workers.group import WorkerGroup

_SUMS = 1024
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def that_differ(workers: WorkerGroup, parameters: Mapping[str, Tensor], step: int, trigger: Trigger) -> list[Tensor]:
    """The parameters that are not the same on all workers. All ranks have to call this.

    Their values are compared by hashes. If all are the same (a frozen backbone), only one handshake is sent.

    Args:
        workers: among which to compare.
        parameters: the parameters, by name.
        step: the number of steps taken, for error messages.
        trigger: what the round that follows is for.

    Raises:
        WorkersDisagreeError: on every worker, if they are not about to compare the same parameters.
        WorkerLostError: if a worker does not answer.
    """
    described: list[Described] = [
        (name, str(parameter.dtype), tuple(parameter.shape), None, ()) for name, parameter in parameters.items()
    ]
    hashes = [content_hash(parameter) for parameter in parameters.values()]
    state = RankState(
        KINDS.index("a comparison of untrained parameters"),
        step,
        trigger=TRIGGERS.index(trigger),
        fingerprint=hash48(repr(described).encode()),
        known=hash48(repr(hashes).encode()),
    )
    handshake = Handshake(workers, state).complete()
    handshake.check_tensors(
        f"The workers do not have the same parameters that no optimizer trains at step {step}.", lambda: described
    )
    if handshake.know_the_same:
        return []
    with naming_lost_workers(workers, state):
        table = workers.table(hashes)
    return [
        parameter
        for parameter, alike in zip(parameters.values(), (table == table[0]).all(dim=0), strict=True)
        if not alike
    ]


def content_hash(tensor: Tensor) -> int:
    """A 48-bit hash of a tensor's values, most of which is computed on the tensor's device.

    The bits of all elements are taken as integers, and those at each 1,024th place are added up.
    """
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    bits = values.view(_INTEGERS[values.element_size()]).reshape(-1)
    whole = len(bits) // _SUMS * _SUMS
    sums = bits[:whole].view(-1, _SUMS).sum(dim=0, dtype=bits.dtype)
    sums[: len(bits) - whole] += bits[whole:]
    return hash48(sums.cpu().numpy().tobytes())
