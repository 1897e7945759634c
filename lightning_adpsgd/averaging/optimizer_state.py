"""An optimizer's state over the workers: averaged where a mean makes sense, the first worker's where it does not."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adpsgd.averaging.averager import ParameterAverager, Terms
from lightning_adpsgd.averaging.layout import FlatLayout, hash48
from lightning_adpsgd.averaging.momentum import known
from lightning_adpsgd.averaging.state_entries import Key, StateEntries, is_plain, map_tensors, named, set_entries
from lightning_adpsgd.workers.group import Contribution, WorkerGroup


def has_state(optimizer: Optimizer) -> bool:
    """Whether there is any."""
    return any(named(state) for state in optimizer.state.values())


def moments(optimizer: Optimizer) -> list[Tensor]:
    """Floating-point state of its parameter's shape (momentum, Adam's moments), by parameter, then by name."""
    averaged, _, _ = StateEntries(optimizer).split(only_moments=True)
    return [averaged[key] for key in sorted(averaged)]


def reset_moments(optimizer: Optimizer) -> None:
    """Set moments, and the counters of their steps, to what they are before the first step; and nothing else.

    So a bias correction starts anew with the moments that it corrects. What is no moment stays: step sizes, second
    weights, the history of L-BFGS; and all state of a parameter of which a part is quantized.

    Args:
        optimizer: one of torch.optim, or one derived from one (see :func:`check_known_moments`).
    """
    kind = known(optimizer)
    assert kind is not None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if isinstance(state, dict) and is_plain(state):
                set_entries(state, kind.moments(group))


def state_at_start(optimizer: Optimizer) -> dict[Any, Any]:
    """A copy of the state that an optimizer has made when it was constructed, for :func:`forget`.

    Empty where that can be done without: optimizers of torch.optim make theirs at a parameter's first step, or it is
    known what it is before that.
    """
    if known(optimizer) is not None:
        return {}
    return {key: map_tensors(state, lambda tensor: tensor.detach().clone()) for key, state in optimizer.state.items()}


def forget(optimizer: Optimizer, at_start: Mapping[Any, Any]) -> None:
    """Set the optimizer's state to what it is before the first step.

    Args:
        optimizer: whose state to forget.
        at_start: what :func:`state_at_start` has returned.
    """
    kind = known(optimizer)
    if kind is not None and kind.made_at_once:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                set_entries(optimizer.state.get(parameter, {}), {**kind.moments(group), "step": 0.0})
        return
    optimizer.state.clear()
    for key, state in at_start.items():
        optimizer.state[key] = map_tensors(state, torch.clone)


def share_state(
    optimizer: Optimizer,
    workers: WorkerGroup,
    bucket_bytes: int,
    shared: Collection[int] = (),
    contribution: Contribution | None = None,
    only_moments: bool = False,
) -> None:
    """Give all workers the same optimizer state, for a checkpoint that all of them could go on from.

    Floating-point tensors become their mean over the workers that have them (a worker may have none for a parameter
    that has had no gradient there, or whose steps were all skipped). Step counters become those of the first worker
    that has them. So does, as a whole, all state of a parameter of which a part is quantized, or otherwise more than
    tensors that have a mean, and numbers: a mean of the scales of quantized values, whose codes have none, would be of
    no use, nor would that of a part of L-BFGS's history. And so does state of no parameter.

    Args:
        optimizer: whose state to share; its parameters have to be known to be the same on all workers.
        workers: whom to share with.
        bucket_bytes: of the longest bucket.
        shared: ids of tensors that are known to be the same on all workers already.
        contribution: this worker's to the mean; None where all workers contribute. One that contributes nothing takes
            all it can get from the others.
        only_moments: average momentum and moments (of their parameter's shape) alone. What would be another worker's
            stays each worker's own, but for a worker that has none of it.
    """
    if workers.size == 1:
        return
    contribution = contribution or workers.all_contribute
    state = StateEntries(optimizer)
    averaged, rest, whole = state.split(only_moments)
    layout = _layout(averaged)
    keys = repr((sorted(averaged), sorted(whole))).encode()
    packed = b"" if only_moments else state.pack(rest)
    fingerprints = workers.table([layout.fingerprint, hash48(keys), hash48(packed)])
    same_layout, same_keys, same_rest = (len(column.unique()) == 1 for column in fingerprints.unbind(dim=1))
    if not (same_layout and same_keys):
        mine = {key: (value.dtype, tuple(value.shape)) for key, value in averaged.items()}
        everybody = workers.gather_objects((mine, whole) if contribution.contributes else ({}, set()))
        whole = set().union(*(each for _, each in everybody))
        rest |= {key: value for key, value in averaged.items() if key[0] in whole}
        layout = _layout(
            _complete(state, averaged, [entries for entries, _ in everybody], whole, workers, contribution)
        )
    elif shared:
        layout = _layout({key: value for key, value in averaged.items() if id(value) not in shared})
    ParameterAverager(layout, 0, workers, bucket_bytes).average(Terms(contribution))
    if not (same_keys and same_rest and contribution.contributors == workers.count):
        _adopt(state, rest, whole, workers, contribution, only_missing=only_moments)


def _complete(
    state: StateEntries,
    averaged: dict[Key, Tensor],
    offered: list[dict[Key, Any]],
    whole: Collection[int],
    workers: WorkerGroup,
    contribution: Contribution,
) -> dict[Key, Tensor]:
    """Entries that any worker has, weighted so that their mean over all workers is that over those that have them."""
    ranks_per_worker = workers.size // workers.count
    complete = {}
    for key in sorted(set().union(*offered)):
        if key[0] in whole:
            continue
        owners = [entries for entries in offered if key in entries]
        # Made anew even where there is one: in memory it may be laid out in another order than the other workers'.
        complete[key] = state.make(key, *owners[0][key])
        if key in averaged:
            complete[key].copy_(averaged[key]).mul_(contribution.contributors * ranks_per_worker / len(owners))
    return complete


def _adopt(
    state: StateEntries,
    rest: dict[Key, Any],
    whole: Collection[int],
    workers: WorkerGroup,
    contribution: Contribution,
    only_missing: bool,
) -> None:
    """Give every worker what is not averaged, each entry (or a whole place) from the first worker that has it.

    With ``only_missing``, workers that contribute take only what they have not got.
    """
    lacking = {place for place in whole if not state.has(place)}

    def unit(key: Key) -> int | Key:
        return key[0] if key[0] in whole else key

    def keep(key: Key) -> bool:
        if not (only_missing and contribution.contributes):
            return False
        return key[0] not in lacking if key[0] in whole else key in rest

    owners: dict[int | Key, int] = {}
    for rank, keys in enumerate(workers.gather_objects([*rest] if contribution.contributes else [])):
        for key in keys:
            owners.setdefault(unit(key), rank)
    for owner in sorted(set(owners.values())):
        is_mine = owner == workers.rank
        mine = {key: value for key, value in rest.items() if is_mine and owners[unit(key)] == owner}
        state.write(workers.broadcast_object(state.pack(mine), owner), keep, whole)


def _layout(averaged: dict[Key, Tensor]) -> FlatLayout:
    return FlatLayout([averaged[key] for key in sorted(averaged)], [None] * len(averaged))
