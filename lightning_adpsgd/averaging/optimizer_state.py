"""Shares an optimizer's state: averages what has a mean, and copies the rest from the first worker that has it."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adpsgd.averaging.averager import ParameterAverager, Terms
from lightning_adpsgd.averaging.layout import FlatLayout, hash48
from lightning_adpsgd.averaging.momentum import known
from lightning_adpsgd.averaging.state_entries import Key, StateEntries, is_plain, map_tensors, named, set_entries
from lightning_adpsgd.workers.contribution import Contribution
from lightning_adpsgd.workers.group import WorkerGroup


def has_state(optimizer: Optimizer) -> bool:
    """Whether the optimizer has any state."""
    return any(named(state) for state in optimizer.state.values())


def moments(optimizer: Optimizer) -> list[Tensor]:
    """Floating-point state with the shape of its parameter (momentum, Adam's moments), by parameter, then by name."""
    averaged, _, _ = StateEntries(optimizer).split(only_moments=True)
    return [averaged[key] for key in sorted(averaged)]


def reset_moments(optimizer: Optimizer) -> None:
    """Set moments and their step counters to their values before the first step, and nothing else.

    So bias corrections start anew with the moments that they correct. Other state stays: step sizes, copies of the
    weights, the history of L-BFGS, and all state of a parameter if a part of that state is quantized. The optimizer has
    to be known (see :func:`check_known_moments`).
    """
    kind = known(optimizer)
    assert kind is not None
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if isinstance(state, dict) and is_plain(state):
                set_entries(state, kind.moments(group))


def state_at_start(optimizer: Optimizer) -> dict[Any, Any]:
    """Copy the state that an optimizer created in its constructor, for :func:`forget`.

    Empty for optimizers of torch.optim: they create their state at a parameter's first step, or its initial values are
    known.
    """
    if known(optimizer) is not None:
        return {}
    return {key: map_tensors(state, lambda tensor: tensor.detach().clone()) for key, state in optimizer.state.items()}


def forget(optimizer: Optimizer, at_start: Mapping[Any, Any]) -> None:
    """Set the optimizer's state to what it was before the first step; ``at_start`` is from :func:`state_at_start`."""
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
    """Give all workers the same optimizer state, for a checkpoint that all of them can continue from.

    Floating-point tensors become their mean over the workers that have them. (A worker has no state for a parameter
    that has had no gradient there, or whose steps were all skipped.) Step counters are copied from the first worker
    that has them, and so is state that belongs to no parameter.

    All state of a parameter is copied from one worker if a part of it is quantized, or is neither a number nor a tensor
    that has a mean. A mean of scales is of no use without a mean of the codes, nor is a mean of a part of L-BFGS's
    history.

    Args:
        optimizer: whose state to share. All workers have to have the same parameters.
        workers: the workers to share with.
        bucket_bytes: size of the largest bucket.
        shared: ids of tensors that are known to be equal on all workers already.
        contribution: this worker's contribution to the mean; None: all workers contribute. A worker that contributes
            nothing takes everything it can from the others.
        only_moments: average only momentum and moments, which have their parameter's shape. Other state stays each
            worker's own; only a worker that lacks it takes it from another.
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
    """Entries that any worker has, scaled so that their mean over all workers is the mean over their owners."""
    ranks_per_worker = workers.size // workers.count
    complete = {}
    for key in sorted(set().union(*offered)):
        if key[0] in whole:
            continue
        owners = [entries for entries in offered if key in entries]
        # Replaced even if it exists: its order in memory may differ from the other workers'.
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
    """Copy what is not averaged: each entry, or all entries of a place in ``whole``, from the first worker that has it.

    With ``only_missing``, workers that contribute take only what they lack.
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
