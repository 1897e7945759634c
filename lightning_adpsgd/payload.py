"""What an optimizer's rounds average: which tensors, laid out how, and under which names people know them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging import FlatLayout, ParameterAverager, Workers, has_mean
from lightning_adpsgd.meeting import Described


class Payload(NamedTuple):
    """The tensors of a round, and the machinery built for them."""

    key: list[tuple[int, int, int | None]]
    parameters: list[Tensor]
    tensors: list[Tensor]
    layout: FlatLayout
    averager: ParameterAverager


class Payloads:
    """Knows what a round averages, and builds that anew when parameter groups or ``requires_grad`` have changed.

    Args:
        optimizer: its parameters are averaged.
        buffers_of: the module whose floating-point buffers are averaged along, if any.
        names_of: the module in which tensors have names, if any.
        workers: whom to average with.
        bucket_bytes: the longest range averaged at once.
        reduce_dtype: the type in which values travel, if not their own.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        buffers_of: nn.Module | None,
        names_of: nn.Module | None,
        workers: Workers,
        bucket_bytes: int,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        # Configuration
        self._optimizer = optimizer
        self._buffers_of = buffers_of
        self._names_of = names_of
        self._workers = workers
        self._bucket_bytes = bucket_bytes
        self._reduce_dtype = reduce_dtype

        # State
        self._latest: Payload | None = None
        self._stepped: set[int] = set()
        self._not_stepped: list[nn.Parameter] = []
        self.note_averaged()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of the optimizer's parameters, in the order of its groups."""
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def current(self) -> Payload:
        """What a round averages now."""
        tensors: list[Tensor] = []
        groups: list[int | None] = []
        for index, group in enumerate(self._optimizer.param_groups):
            for parameter in group["params"]:
                if parameter.requires_grad or id(parameter) in self._stepped:
                    tensors.append(parameter)
                    groups.append(index)
        parameters = list(tensors)
        if self._buffers_of is not None:
            tensors += [buffer for buffer in self._buffers_of.buffers() if has_mean(buffer)]
        groups += [None] * (len(tensors) - len(groups))

        key = [(id(tensor), tensor.data_ptr(), group) for tensor, group in zip(tensors, groups, strict=True)]
        if self._latest is None or self._latest.key != key:
            layout = FlatLayout(tensors, groups)
            group_count = len(self._optimizer.param_groups)
            averager = ParameterAverager(layout, group_count, self._workers, self._bucket_bytes, self._reduce_dtype)
            self._latest = Payload(key, parameters, tensors, layout, averager)
        return self._latest

    @property
    def owes(self) -> bool:
        """Whether workers still owe each other what rounding has cut off."""
        return self._latest is not None and getattr(self._latest.averager.differences, "owes", False)

    def start_from_the_same(self) -> None:
        """Take note that what is averaged is the same on all workers."""
        if self._reduce_dtype is not None:
            differences = self.current().averager.differences
            assert differences is not None
            differences.start()

    def note_step(self) -> None:
        """Take note of the parameters that are being trained: they may be frozen by the time of the round.

        Adversarial networks, whose parts are frozen in turn, would otherwise drift apart. It costs something in the
        first step after a round, and then only where parameters are frozen.
        """
        if self._not_stepped:
            self._stepped.update(id(parameter) for parameter in self._not_stepped if parameter.requires_grad)
            self._not_stepped = [parameter for parameter in self._not_stepped if not parameter.requires_grad]

    def note_averaged(self) -> None:
        """Take note that all parameters that were trained are now the same on all workers."""
        self._stepped = set()
        self._not_stepped = [*self.parameters()]

    def describe(self, layout: FlatLayout, tensors: Sequence[Tensor]) -> list[Described]:
        """What all workers have to agree on, with names for people."""
        entries = zip(layout.indices, layout.signature, strict=True)
        return [(self.name_of(tensors[index]), *entry) for index, entry in entries]

    def name_of(self, tensor: Tensor) -> str:
        """The name that a person would look for."""
        if self._names_of is not None:
            for name, candidate in (*self._names_of.named_parameters(), *self._names_of.named_buffers()):
                if candidate is tensor:
                    return name
        for g, group in enumerate(self._optimizer.param_groups):
            for p, parameter in enumerate(group["params"]):
                if parameter is tensor:
                    return f"parameter {p} of group {g}"
                for name, value in self._optimizer.state.get(parameter, {}).items():
                    if value is tensor:
                        return f"{name} of {self.name_of(parameter)}"
        return "a tensor that is averaged along with the parameters"


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element of any tensor is NaN or infinite."""
    return bool(FlatLayout(tensors, [0] * len(tensors)).are_finite())


def squared_norm(tensors: Sequence[Tensor]) -> float:
    """Σ ‖w‖² over all tensors."""
    return sum(float(norm) ** 2 for norm in torch._foreach_norm([tensor.data for tensor in tensors]))
