"""Access to an optimizer's state by the place of each parameter, which is the same on all workers."""

import io
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging.layout import has_mean

Key = tuple[int, str]
"""An entry: the place of its parameter (the index among all parameters of the optimizer), and its name."""

_OF_NO_PARAMETER = -1
"""The place of state whose key in ``optimizer.state`` is not a parameter."""
_NAMELESS = ""
"""The name used if a parameter's state is not a mapping but a single value, such as a tensor."""


class StateEntries:
    """Reads and overwrites the entries of an optimizer's state."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._state: dict[Any, Any] = optimizer.state
        self._parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]

    def split(self, only_moments: bool = False) -> tuple[dict[Key, Tensor], dict[Key, Any], set[int]]:
        """Split the entries: those to average, the rest, and the places whose state comes whole from one worker.

        With ``only_moments``, only entries that have their parameter's shape are averaged.
        """
        averaged: dict[Key, Tensor] = {}
        rest: dict[Key, Any] = {}
        whole: set[int] = set()
        for place, state in self._places():
            if place == _OF_NO_PARAMETER and only_moments:
                continue
            if place == _OF_NO_PARAMETER or not is_plain(state):
                whole.add(place)
            for name in sorted(state, key=str):
                value = state[name]
                if place not in whole and self._is_averaged(place, name, value, only_moments):
                    averaged[place, name] = value
                elif value is not None:
                    rest[place, name] = value
        return averaged, rest, whole

    def make(self, key: Key, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Create an entry of zeros, in the memory format of its parameter if it has the same shape."""
        parameter = self._parameters[key[0]]
        if shape == tuple(parameter.shape):
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            value = torch.zeros(shape, dtype=dtype, device=parameter.device)
        self._put(key, value)
        return value

    def has(self, place: int) -> bool:
        """Whether a place has any entries."""
        return bool(self._at(place))

    def pack(self, entries: dict[Key, Any]) -> bytes:
        """Serialize entries. What is not on the CPU here goes to the device of the receiver's parameter."""
        on_cpu = {key: isinstance(value, Tensor) and value.device.type == "cpu" for key, value in entries.items()}
        file = io.BytesIO()
        torch.save((on_cpu, map_tensors(entries, lambda tensor: tensor.detach().cpu())), file)
        return file.getvalue()

    def write(self, packed: bytes, keep: Callable[[Key], bool], whole: Collection[int]) -> None:
        """Overwrite entries with those of :meth:`pack`, tensors in place, except those to ``keep``.

        Places in ``whole`` that are overwritten lose all other entries.
        """
        on_cpu, entries = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=False)
        written = [key for key in entries if not keep(key)]
        for key in written:
            place, name = key
            mine, value = self._at(place).get(name), entries[key]
            if isinstance(mine, Tensor) and _fits(mine, value):
                mine.copy_(value)
            else:
                device = torch.device("cpu") if on_cpu[key] else self._parameters[max(place, 0)].device
                self._put(key, map_tensors(value, partial(Tensor.to, device=device)))
        for place in {place for place, _ in written} & {*whole}:
            for name in [*self._at(place)]:
                if (place, name) not in entries:
                    self._remove((place, name))

    # Details

    def _places(self) -> Iterator[tuple[int, Mapping[str, Any]]]:
        places = range(_OF_NO_PARAMETER, len(self._parameters))
        return ((place, self._at(place)) for place in places if self.has(place))

    def _at(self, place: int) -> Mapping[Any, Any]:
        if place == _OF_NO_PARAMETER:
            return {key: state for key, state in self._state.items() if not isinstance(key, Tensor)}
        return named(self._state.get(self._parameters[place]))

    def _put(self, key: Key, value: Any) -> None:
        state, name = self._holder(key)
        state[name] = value

    def _remove(self, key: Key) -> None:
        state, name = self._holder(key)
        del state[name]

    def _holder(self, key: Key) -> tuple[dict[Any, Any], Any]:
        """The dict that holds an entry, and the entry's key in it."""
        place, name = key
        if place == _OF_NO_PARAMETER:
            return self._state, name
        parameter = self._parameters[place]
        return (self._state, parameter) if name == _NAMELESS else (self._state[parameter], name)

    def _is_averaged(self, place: int, name: str, value: object, only_moments: bool) -> bool:
        if name == "step" or not isinstance(value, Tensor) or not has_mean(value):
            return False
        return value.shape == self._parameters[place].shape or (value.dim() > 0 and not only_moments)


def named(state: Any) -> Mapping[str, Any]:
    """A parameter's state as a mapping from names to entries."""
    if isinstance(state, Mapping):
        return state
    return {} if state is None else {_NAMELESS: state}


def is_plain(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state has only numbers and tensors that have a mean, and no codes of quantized values."""
    return all(_is_plain_entry(name, value) for name, value in state.items())


def set_entries(state: dict[str, Any], values: Mapping[str, float | None]) -> None:
    """Set existing entries to these values, tensors in place; remove existing entries whose value is None."""
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


def map_tensors(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every tensor in it replaced by ``move(tensor)``."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, move) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(item, move) for item in value)
    return value


def _is_plain_entry(name: str, value: object) -> bool:
    if value is None or isinstance(value, int | float):
        return True
    if type(value) not in (Tensor, nn.Parameter):  # subclasses may hold codes and scales inside
        return False
    assert isinstance(value, Tensor)
    if value.numel() == 1 and (name == "step" or value.dtype in (torch.int16, torch.int32, torch.int64)):
        return True  # a counter
    # An 8-bit float is a code, too: it comes with a scale.
    return has_mean(value) and value.element_size() > 1 and value.layout == torch.strided


def _fits(mine: Tensor, value: object) -> bool:
    """Whether ``value`` can be copied into ``mine`` in place."""
    return type(mine) is type(value) and (mine.shape, mine.dtype) == (value.shape, value.dtype)
