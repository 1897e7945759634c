"""Finds the parameters that no optimizer trains, but that have come to differ: target networks, EMA teachers."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_adpsgd.averaging.layout import Described, hash48
from lightning_adpsgd.averaging.tiles import at_once
from lightning_adpsgd.rounds.handshake import KINDS, Handshake, RankState, naming_lost_workers
from lightning_adpsgd.rounds.record import TRIGGERS, Trigger
from lightning_adpsgd.workers.group import WorkerGroup

_SUMS = 1024
_FACTOR = 2654435761  # 2^32 / golden ratio
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


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

    The bits are laid out in rows of 1,024 words. Each word is mixed with its upper half and multiplied by an odd number
    of its row, then the rows are added up: neither signs nor powers of two nor rows that are swapped cancel out.
    """
    values = tensor.detach().resolve_conj().resolve_neg()
    values = torch.view_as_real(values) if values.is_complex() else values
    bits = values.contiguous().view(-1).view(_WORDS[values.element_size()])
    sums = torch.zeros(_SUMS, dtype=torch.int32, device=bits.device)
    for number, piece in enumerate(bits.split(at_once(bits.device))):
        words = piece.to(torch.int32)
        words = words ^ ((words >> 15) & 0x1FFFF)  # >> repeats the sign bit; not in place: it may be the tensor itself
        whole = len(words) // _SUMS
        rows = torch.arange(whole + 1, device=bits.device) + number * (at_once(bits.device) // _SUMS)
        factors = (2 * rows * _FACTOR + 1).to(torch.int32)[:, None]
        sums += (words[: whole * _SUMS].view(whole, _SUMS) * factors[:whole]).sum(dim=0, dtype=torch.int32)
        sums[: len(words) - whole * _SUMS] += words[whole * _SUMS :] * factors[whole]
    return hash48(sums.cpu().numpy().tobytes())
