"""An optimizer's state over the workers: averaged where a mean makes sense, the first worker's where it does not."""

import io
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging.averager import ParameterAverager
from lightning_adpsgd.averaging.layout import FlatLayout, has_mean, hash48
from lightning_adpsgd.averaging.momentum import known
from lightning_adpsgd.workers.group import Contribution, WorkerGroup

Key = tuple[int, str]
"""Of one entry: the parameter's place in the optimizer's groups, and the entry's name."""

_OF_NO_PARAMETER = -1
"""The place of state that the optimizer keeps under other keys than parameters."""
_NAMELESS = ""
"""The name of a parameter's state that is no mapping from names, but a tensor for example."""


def has_state(optimizer: Optimizer) -> bool:
    """Whether there is any."""
    return any(_named(state) for state in optimizer.state.values())


def moments(optimizer: Optimizer) -> list[Tensor]:
    """Floating-point state of its parameter's shape (momentum, Adam's moments), by parameter, then by name."""
    averaged, _, _ = _State(optimizer).split(only_moments=True)
    return [averaged[key] for key in sorted(averaged)]


def reset_moments(optimizer: Optimizer) -> None:
    """Leave moments, and the counters of their steps, as they are before the first step; and nothing else otherwise.

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
            if isinstance(state, dict) and _is_plain(state):
                _set(state, kind.moments(group))


def state_at_start(optimizer: Optimizer) -> dict[Any, Any]:
    """A copy of the state that an optimizer has made when it was constructed, for :func:`forget`.

    Empty where that can be done without: optimizers of torch.optim make theirs at a parameter's first step, or it is
    known what it is before that.
    """
    if known(optimizer) is not None:
        return {}
    return {key: _map(state, lambda tensor: tensor.detach().clone()) for key, state in optimizer.state.items()}


def forget(optimizer: Optimizer, at_start: Mapping[Any, Any]) -> None:
    """Leave the optimizer's state as it is before the first step.

    Args:
        optimizer: whose state to forget.
        at_start: what :func:`state_at_start` has returned.
    """
    kind = known(optimizer)
    if kind is not None and kind.made_at_once:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                _set(optimizer.state.get(parameter, {}), {**kind.moments(group), "step": 0.0})
        return
    optimizer.state.clear()
    for key, state in at_start.items():
        optimizer.state[key] = _map(state, torch.clone)


def average_moments(
    optimizer: Optimizer, workers: WorkerGroup, bucket_bytes: int, share: Contribution | None = None
) -> None:
    """Replace momentum and moments by their mean over the workers; step counters stay each worker's own.

    A worker that has none for a parameter (which has had no gradient there, or whose steps were all skipped) takes the
    mean of those that have some, with their step counter. State of a parameter of which a part is quantized (or is
    otherwise more than tensors that have a mean, and numbers) stays each worker's own.

    Args:
        optimizer: whose state to average; its parameters have to be known to be the same on all workers.
        workers: whom to average with.
        bucket_bytes: the longest range averaged at once.
        share: what this worker contributes to the mean; None where all workers do. One that contributes nothing takes
            all it can get from the others, step counters too.
    """
    _share(optimizer, workers, bucket_bytes, share or workers.all_contribute, only_moments=True)


def share_state(
    optimizer: Optimizer,
    workers: WorkerGroup,
    bucket_bytes: int,
    shared: Collection[int] = (),
    share: Contribution | None = None,
) -> None:
    """Give all workers the same optimizer state, for a checkpoint that all of them could go on from.

    Floating-point tensors become their mean over the workers that have them (a worker may have none for a parameter
    that has had no gradient there). Step counters become those of the first worker that has them. So does, as a whole,
    all state of a parameter whose state is more than that: a mean of the scales of quantized values, whose codes have
    none, would be of no use, nor would that of a part of L-BFGS's history. And so does state of no parameter.

    Args:
        optimizer: whose state to share; its parameters have to be known to be the same on all workers.
        workers: whom to share with.
        bucket_bytes: the longest range averaged at once.
        shared: ids of tensors that are known to be the same on all workers already.
        share: what this worker contributes; None where all workers do.
    """
    _share(optimizer, workers, bucket_bytes, share or workers.all_contribute, shared=shared)


def _share(
    optimizer: Optimizer,
    workers: WorkerGroup,
    bucket_bytes: int,
    share: Contribution,
    only_moments: bool = False,
    shared: Collection[int] = (),
) -> None:
    if workers.size == 1:
        return
    state = _State(optimizer)
    averaged, rest, whole = state.split(only_moments)
    all_contribute = share.contributors == workers.count
    layout = _layout(averaged)
    keys = repr((sorted(averaged), sorted(whole))).encode()
    packed = b"" if only_moments else state.pack(rest)
    fingerprints = workers.table([layout.fingerprint, hash48(keys), hash48(packed)])
    same_layout, same_keys, same_rest = (len(column.unique()) == 1 for column in fingerprints.unbind(dim=1))
    if not (same_layout and same_keys):
        offered = (state.describe(averaged), whole) if share.contributes else ({}, set())
        everybody = workers.gather_objects(offered)
        whole = set().union(*(each for _, each in everybody))
        rest |= {key: value for key, value in averaged.items() if key[0] in whole}
        layout = _layout(_complete(state, averaged, [entries for entries, _ in everybody], whole, workers, share))
    elif shared:
        layout = _layout({key: value for key, value in averaged.items() if id(value) not in shared})
    ParameterAverager(layout, 0, workers, bucket_bytes).average(share)
    if not (same_keys and same_rest and all_contribute):
        _adopt(state, rest, whole, workers, share, only_missing=only_moments)


class _State:
    """Access to an optimizer's state by the place of its parameters, which is the same on all workers."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._state: dict[Any, Any] = optimizer.state
        self._parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]

    def split(self, only_moments: bool = False) -> tuple[dict[Key, Tensor], dict[Key, Any], set[int]]:
        """What is averaged, the rest, and the places whose state is taken from one worker, whole.

        Args:
            only_moments: average what has its parameter's shape, and nothing else.
        """
        averaged: dict[Key, Tensor] = {}
        rest: dict[Key, Any] = {}
        whole: set[int] = set()
        for place, state in self._places():
            if place == _OF_NO_PARAMETER and only_moments:
                continue
            if place == _OF_NO_PARAMETER or not _is_plain(state):
                whole.add(place)
            for name, value in state.items():
                if place not in whole and self._is_averaged(place, name, value, only_moments):
                    averaged[place, name] = value
                elif value is not None:
                    rest[place, name] = value
        return averaged, rest, whole

    def describe(self, averaged: dict[Key, Tensor]) -> dict[Key, tuple[torch.dtype, tuple[int, ...]]]:
        return {key: (value.dtype, tuple(value.shape)) for key, value in averaged.items()}

    def make(self, key: Key, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Put an entry of zeros there, laid out in memory like its parameter if it has its shape."""
        parameter = self._parameters[key[0]]
        if shape == tuple(parameter.shape):
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            value = torch.zeros(shape, dtype=dtype, device=parameter.device)
        self._put(key, value)
        return value

    def has(self, place: int) -> bool:
        return bool(self._state_of(place))

    def pack(self, entries: dict[Key, Any]) -> bytes:
        """Entries as bytes. What is on a GPU here is to be on the receiver's own GPU there."""
        on_cpu = {key: isinstance(value, Tensor) and value.device.type == "cpu" for key, value in entries.items()}
        file = io.BytesIO()
        torch.save((on_cpu, {key: _map(value, lambda t: t.detach().cpu()) for key, value in entries.items()}), file)
        return file.getvalue()

    def write(self, packed: bytes, keep: Callable[[Key], bool]) -> None:
        """Overwrite entries with those of :meth:`pack`, tensors in place, but for those to ``keep``."""
        on_cpu, entries = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)
        for key, value in entries.items():
            if keep(key):
                continue
            place, name = key
            mine = self._state_of(place).get(name)
            if isinstance(mine, Tensor) and _fits(mine, value):
                mine.copy_(value)
            else:
                device = torch.device("cpu") if on_cpu[key] else self._parameters[max(place, 0)].device
                self._put(key, _map(value, partial(Tensor.to, device=device)))

    def remove_others(self, place: int, names: Collection[str]) -> None:
        """Remove a place's entries, but for those with these names."""
        state = self._keyed() if place == _OF_NO_PARAMETER else self._state.get(self._parameters[place])
        for name in [*_named(state)]:
            if name in names:
                continue
            if place == _OF_NO_PARAMETER:
                del self._state[name]
            elif isinstance(state, dict):
                del state[name]
            else:
                del self._state[self._parameters[place]]

    # Details

    def _places(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        for place in range(_OF_NO_PARAMETER, len(self._parameters)):
            state = self._state_of(place)
            if state:
                yield place, {name: state[name] for name in sorted(state, key=str)}

    def _state_of(self, place: int) -> Mapping[str, Any]:
        return self._keyed() if place == _OF_NO_PARAMETER else _named(self._state.get(self._parameters[place]))

    def _keyed(self) -> Mapping[Any, Any]:
        """State under other keys than parameters."""
        return {key: state for key, state in self._state.items() if not isinstance(key, Tensor)}

    def _put(self, key: Key, value: Any) -> None:
        place, name = key
        if place == _OF_NO_PARAMETER:
            self._state[name] = value
        elif name == _NAMELESS:
            self._state[self._parameters[place]] = value
        else:
            self._state[self._parameters[place]][name] = value

    def _is_averaged(self, place: int, name: str, value: object, only_moments: bool) -> bool:
        if name == "step" or not isinstance(value, Tensor) or not has_mean(value):
            return False
        return value.shape == self._parameters[place].shape or (value.dim() > 0 and not only_moments)


def _complete(
    state: _State,
    averaged: dict[Key, Tensor],
    offered: list[dict[Key, Any]],
    whole: Collection[int],
    workers: WorkerGroup,
    share: Contribution,
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
            complete[key].copy_(averaged[key]).mul_(share.contributors * ranks_per_worker / len(owners))
    return complete


def _adopt(
    state: _State,
    rest: dict[Key, Any],
    whole: Collection[int],
    workers: WorkerGroup,
    share: Contribution,
    only_missing: bool,
) -> None:
    """Give every worker what is not averaged, each entry (or a whole place) from the first worker that has it.

    Args:
        state: this worker's.
        rest: its entries that are not averaged.
        whole: places of which all entries come from one worker.
        workers: who give and take.
        share: whether this worker gives, or takes all it can get.
        only_missing: whether workers that give take only what they have not got.
    """
    lacking = {place for place in whole if not state.has(place)}
    owners: dict[int | Key, int] = {}
    for rank, keys in enumerate(workers.gather_objects([*rest] if share.contributes else [])):
        for key in keys:
            owners.setdefault(key[0] if key[0] in whole else key, rank)

    def owner_of(key: Key) -> int:
        return owners[key[0] if key[0] in whole else key]

    def keep(key: Key) -> bool:
        if not (only_missing and share.contributes):
            return False
        return key[0] not in lacking if key[0] in whole else key in rest

    for owner in sorted(set(owners.values())):
        is_mine = owner == workers.rank
        mine = {key: value for key, value in rest.items() if owner_of(key) == owner} if is_mine else {}
        names: dict[int, list[str]] = {}
        packed = workers.broadcast_object((state.pack(mine), [*mine]), owner)
        state.write(packed[0], keep)
        for place, name in packed[1]:
            names.setdefault(place, []).append(name)
        for place in names.keys() & set(whole):
            if not keep((place, _NAMELESS)):
                state.remove_others(place, names[place])


def _named(state: Any) -> Mapping[str, Any]:
    """A parameter's state, entry by entry."""
    if isinstance(state, Mapping):
        return state
    return {} if state is None else {_NAMELESS: state}


def _is_plain(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state is numbers and tensors that have a mean, and no codes of quantized values."""
    return all(_is_plain_entry(name, value) for name, value in state.items())


def _is_plain_entry(name: str, value: object) -> bool:
    if value is None or isinstance(value, int | float):
        return True
    if type(value) not in (Tensor, nn.Parameter):  # subclasses may hold codes and scales inside
        return False
    assert isinstance(value, Tensor)
    if value.numel() == 1 and (name == "step" or value.dtype in (torch.int16, torch.int32, torch.int64)):
        return True  # a counter
    # A floating-point number of 8 bits is a code, too, that goes with a scale.
    return has_mean(value) and value.element_size() > 1 and value.layout == torch.strided


def _fits(mine: Tensor, value: object) -> bool:
    """Whether the one can be overwritten with the other, in place."""
    return type(mine) is type(value) and (mine.shape, mine.dtype) == (value.shape, value.dtype)


def _set(state: dict[str, Any], values: Mapping[str, float | None]) -> None:
    """Give entries that are there these values, tensors in place; remove those that are to be None."""
    for name, value in values.items():
        mine = state.get(name)
        if mine is None:
            continue
        if value is None:
            del state[name]
        elif isinstance(mine, Tensor):
            mine.fill_(complex(value, value) if mine.is_complex() and value else value)
        else:
            state[name] = type(mine)(value)


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
