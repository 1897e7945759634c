"""An optimizer's state over the workers: averaged where a mean makes sense, the first worker's where it does not."""

import io
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging.averager import ParameterAverager
from lightning_adpsgd.averaging.layout import FlatLayout, has_mean, hash48
from lightning_adpsgd.averaging.workers import Share, Workers

Key = tuple[int, str]
"""Of one entry: the parameter's place in the optimizer's groups, and the entry's name."""


def moments(optimizer: Optimizer) -> list[Tensor]:
    """Floating-point state of its parameter's shape (momentum, Adam's moments), by parameter, then by name."""
    return [
        value
        for _, parameter, name, value in _entries(optimizer)
        if _is_averaged(name, value) and value.shape == parameter.shape
    ]


def forget(optimizer: Optimizer, made_at_once: Collection[Tensor]) -> None:
    """Leave the optimizer's state as it is before the first step.

    Args:
        optimizer: whose state to forget.
        made_at_once: parameters whose state the optimizer makes when it is constructed, not at their first step: it
            would miss that state, so it is set to zero.
    """
    for parameter in [*_parameters(optimizer)]:
        if parameter not in made_at_once:
            optimizer.state.pop(parameter, None)
    for _, parameter, name, value in [*_entries(optimizer)]:
        if isinstance(value, Tensor):
            value.zero_()
        elif isinstance(value, int | float) and not isinstance(value, bool):
            optimizer.state[parameter][name] = type(value)(0)


def average_moments(optimizer: Optimizer, workers: Workers, bucket_bytes: int, share: Share | None = None) -> None:
    """Replace momentum and moments by their mean over the workers; step counters stay each worker's own.

    A worker that has none for a parameter (which has had no gradient there, or whose steps were all skipped) takes the
    mean of those that have some, with their step counter.

    Args:
        optimizer: whose state to average; its parameters have to be known to be the same on all workers.
        workers: whom to average with.
        bucket_bytes: the longest range averaged at once.
        share: what this worker contributes to the mean; None where all workers do.
    """
    if workers.size == 1:
        return
    state = _State(optimizer)
    averaged, rest = state.split(only_moments=True)
    same_keys, _ = _average(state, averaged, b"", workers, bucket_bytes, share)
    if not same_keys:
        _adopt(state, rest, workers, only_missing=True)


def share_state(optimizer: Optimizer, workers: Workers, bucket_bytes: int, shared: Collection[int] = ()) -> None:
    """Give all workers the same optimizer state, for a checkpoint that all of them could go on from.

    Floating-point tensors become their mean over the workers that have them (a worker may have none for a parameter
    that has had no gradient there). Everything else, step counters among it, becomes that of the first worker that has
    it; so does all state of a parameter whose state is more than tensors and numbers, like the history of L-BFGS.

    Args:
        optimizer: whose state to share; its parameters have to be known to be the same on all workers.
        workers: whom to share with.
        bucket_bytes: the longest range averaged at once.
        shared: ids of tensors that are known to be the same on all workers already.
    """
    if workers.size == 1:
        return
    state = _State(optimizer)
    averaged, rest = state.split()
    same_keys, same_rest = _average(state, averaged, state.pack(rest), workers, bucket_bytes, shared=shared)
    if not (same_keys and same_rest):
        _adopt(state, rest, workers)


class _State:
    """Access to an optimizer's state by the place of its parameters, which is the same on all workers."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._parameters = [*_parameters(optimizer)]

    def split(self, only_moments: bool = False) -> tuple[dict[Key, Tensor], dict[Key, Any]]:
        """What is averaged, and the rest.

        Args:
            only_moments: average what has its parameter's shape, and nothing else.
        """
        averaged: dict[Key, Tensor] = {}
        rest: dict[Key, Any] = {}
        for place, parameter, name, value in _entries(self._optimizer):
            plain = only_moments or all(
                isinstance(v, Tensor | int | float | None) for v in self._optimizer.state[parameter].values()
            )
            fits = _is_averaged(name, value) and (
                value.shape == parameter.shape or (value.dim() > 0 and not only_moments)
            )
            if plain and fits:
                averaged[place, name] = value
            elif value is not None:
                rest[place, name] = value
        return averaged, rest

    def describe(self, averaged: dict[Key, Tensor]) -> dict[Key, tuple[torch.dtype, tuple[int, ...]]]:
        return {key: (value.dtype, tuple(value.shape)) for key, value in averaged.items()}

    def make(self, key: Key, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Put an entry of zeros there, laid out in memory like its parameter if it has its shape."""
        place, name = key
        parameter = self._parameters[place]
        if shape == tuple(parameter.shape):
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            value = torch.zeros(shape, dtype=dtype, device=parameter.device)
        self._optimizer.state[parameter][name] = value
        return value

    def pack(self, entries: dict[Key, Any]) -> bytes:
        """Entries as bytes. What is on a GPU here is to be on the receiver's own GPU there."""
        on_cpu = {key: isinstance(value, Tensor) and value.device.type == "cpu" for key, value in entries.items()}
        file = io.BytesIO()
        torch.save((on_cpu, {key: _map(value, lambda t: t.detach().cpu()) for key, value in entries.items()}), file)
        return file.getvalue()

    def write(self, packed: bytes, only_missing: bool) -> None:
        """Overwrite entries (or only add missing ones) with those of :meth:`pack`; tensors in place."""
        on_cpu, entries = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)
        for (place, name), value in entries.items():
            parameter = self._parameters[place]
            mine = self._optimizer.state[parameter].get(name)
            if only_missing and mine is not None:
                continue
            if isinstance(mine, Tensor) and isinstance(value, Tensor) and mine.shape == value.shape:
                mine.copy_(value)
            else:
                device = torch.device("cpu") if on_cpu[place, name] else parameter.device
                self._optimizer.state[parameter][name] = _map(value, partial(Tensor.to, device=device))


def _average(
    state: _State,
    averaged: dict[Key, Tensor],
    packed_rest: bytes,
    workers: Workers,
    bucket_bytes: int,
    share: Share | None = None,
    shared: Collection[int] = (),
) -> tuple[bool, bool]:
    """Average entries over the workers that have them, unless they are known to be ``shared`` already.

    Returns:
        Whether all workers had the same entries to average, and whether they have the same rest.
    """
    layout = _layout(averaged)
    fingerprints = workers.table([layout.fingerprint, hash48(repr(sorted(averaged)).encode()), hash48(packed_rest)])
    same_layout, same_keys, same_rest = (len(column.unique()) == 1 for column in fingerprints.unbind(dim=1))
    if not (same_layout and same_keys):
        layout = _layout(_complete(state, averaged, workers, share))
    elif shared:
        layout = _layout({key: value for key, value in averaged.items() if id(value) not in shared})
    ParameterAverager(layout, 0, workers, bucket_bytes).average(share)
    return same_keys, same_rest


def _complete(
    state: _State, averaged: dict[Key, Tensor], workers: Workers, share: Share | None = None
) -> dict[Key, Tensor]:
    """Entries that any worker has, weighted so that their mean over all workers is that over those that have them."""
    share = share or workers.everybody
    ranks_per_worker = workers.size // workers.count
    everybody = workers.gather_objects(state.describe(averaged) if share.contributes else {})
    complete = {}
    for key in sorted(set().union(*everybody)):
        owners = [entries for entries in everybody if key in entries]
        # Made anew even where there is one: in memory it may be laid out in another order than the other workers'.
        complete[key] = state.make(key, *owners[0][key])
        if key in averaged:
            complete[key].copy_(averaged[key]).mul_(share.contributors * ranks_per_worker / len(owners))
    return complete


def _adopt(state: _State, rest: dict[Key, Any], workers: Workers, only_missing: bool = False) -> None:
    """Give every worker those entries that are not averaged, each from the first worker that has it."""
    owners: dict[Key, int] = {}
    for rank, keys in enumerate(workers.gather_objects([*rest])):
        for key in keys:
            owners.setdefault(key, rank)
    for owner in sorted(set(owners.values())):
        mine = {key: rest[key] for key in owners if owners[key] == owner} if owner == workers.rank else {}
        state.write(workers.broadcast_object(state.pack(mine), owner), only_missing)


def _entries(optimizer: Optimizer) -> Iterator[tuple[int, nn.Parameter, str, Any]]:
    for place, parameter in enumerate(_parameters(optimizer)):
        state = optimizer.state.get(parameter, {})
        for name in sorted(state, key=str):
            yield place, parameter, name, state[name]


def _parameters(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    for group in optimizer.param_groups:
        yield from group["params"]


def _is_averaged(name: str, value: object) -> bool:
    return name != "step" and isinstance(value, Tensor) and has_mean(value)


def _layout(averaged: dict[Key, Tensor]) -> FlatLayout:
    return FlatLayout([averaged[key] for key in sorted(averaged)], [None] * len(averaged))


def _map(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it replaced."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, dict):
        return {key: _map(item, move) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(item, move) for item in value)
    return value
