"""What an optimizer's rounds average: which tensors, laid out how, and under which names people know them."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging.averager import ParameterAverager
from lightning_adpsgd.averaging.buffers import averaged_buffers, buffer_names, buffers_of, matches
from lightning_adpsgd.averaging.layout import Bucket, Described, FlatLayout, Order
from lightning_adpsgd.workers.group import WorkerGroup


class _Member(NamedTuple):
    """A tensor that is averaged."""

    key: int | str
    """What it is known by: its name in the module; a parameter that has none by its identity, whatever its data."""
    tensor: Tensor
    group: int | None


_Place = tuple[int, int, tuple[int, ...], int]


def _places(tensors: list[Tensor]) -> list[_Place]:
    """Differ from what they were if elements have moved in memory; as long as the tensors are kept.

    They are looked at at every step of a staggered round, of perhaps thousands of tensors.
    """
    return [(id(tensor), tensor.data_ptr(), tensor.stride(), tensor.numel()) for tensor in tensors]


class AveragedTensors:
    """The tensors of a round, and the machinery built for them.

    Args:
        members: what is averaged.
        averager: averages it.
        before: what was averaged before it.
    """

    def __init__(self, members: list[_Member], averager: ParameterAverager, before: "AveragedTensors | None") -> None:
        self.layout = averager.layout
        self.averager = averager
        self._members = members
        self._groups = [member.group for member in members]
        self._places = _places(self.tensors)
        self._before = before

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, as they are now."""
        return [member.tensor for member in self._members]

    @property
    def parameters(self) -> list[Tensor]:
        """Those that are parameters."""
        return [member.tensor for member in self._members if isinstance(member.tensor, nn.Parameter)]

    def is_at(self, tensors: list[Tensor], groups: list[int | None]) -> bool:
        """Whether these are the same tensors, of which no element has moved in memory."""
        return groups == self._groups and _places(tensors) == self._places

    def is_of(self, members: list[_Member]) -> bool:
        """Whether these are the same tensors; if so, their elements are found from now on where they are now.

        User code may re-assign buffers and re-point ``p.data``. What makes a tensor the same is its name, its place in
        the order, and what workers have to agree on: shape, dtype, and parameter group.
        """
        names = [(member.key, member.group) for member in members]
        if names != [(member.key, member.group) for member in self._members]:
            return False
        if not self.layout.rebind([member.tensor for member in members]):
            return False
        self._members, self._places = members, _places([member.tensor for member in members])
        return True

    def rebind(self, buffers: Mapping[str, Tensor]) -> None:
        """Find the elements where they are now, where something else is averaged by now.

        Args:
            buffers: the module's, by name.
        """
        self._members = [
            member
            if isinstance(member.tensor, nn.Parameter)
            else member._replace(tensor=buffers.get(str(member.key), member.tensor))
            for member in self._members
        ]
        self._places = _places(self.tensors)
        self.layout.rebind(self.tensors)

    def take_over(self) -> None:
        """Go on from the averages, and from what rounding has cut off, of what was averaged before; once.

        Nothing of that may be under way any more.
        """
        before, self._before = self._before, None
        if before is None or before.averager.delta is None or self.averager.delta is None:
            return
        before.take_over()
        were = before.entries
        both = [(were[key], now) for key, now in self.entries.items() if key in were]
        places = [(was.range, now.range) for was, now in both if was.kind == now.kind]
        self.averager.delta.take_over(before.averager.delta, places)
        for was, now in places:
            owed = before.averager.delta.owed(was)
            if owed is not None and self.averager.delta.owed(now) is None:
                # It has been removed, and travels once more, as it is.
                values = self.layout.pack(now, self.layout.new_buffer(now, owed.device))
                self.layout.unpack(now, values.add_(owed))

    def start(self) -> None:
        """Take note that all workers hold the same."""
        self._before = None
        if self.averager.delta is not None:
            self.averager.delta.start()

    @property
    def stated(self) -> dict[str, int]:
        """What workers state of it when they meet (see :class:`RankState`)."""
        delta = self.averager.delta
        known = 0 if delta is None else delta.fingerprint
        return {"fingerprint": self.layout.fingerprint, "known": known}

    def agree(self, know_the_same: bool) -> None:
        """Take note of what the others know: only where all know the same average can differences from it travel."""
        if self.averager.delta is not None and not know_the_same:
            self.averager.delta.forget()

    @property
    def entries(self) -> "dict[int | str, _Entry]":
        """What was laid out, by what it is known by."""
        laid_out = zip(self.layout.indices, self.layout.signature, self.layout.places, strict=True)
        return {
            self._members[index].key: _Entry(bucket, (dtype, shape), cast(Order, order))
            for index, (dtype, shape, _, order), bucket in laid_out
        }


class _Entry(NamedTuple):
    """Where a tensor was laid out."""

    range: Bucket
    kind: tuple[object, object]
    """Its dtype and shape."""
    order: Order


class TensorTracker:
    """Knows what a round averages, and builds that anew when parameter groups or ``requires_grad`` have changed.

    Args:
        optimizer: its parameters are averaged.
        buffers_of: the module whose persistent floating-point buffers are averaged along, if any.
        exclude_buffers: patterns (as of ``fnmatch``) of names of buffers that are not.
        names_of: the module in which tensors have names, if any.
        workers: whom to average with.
        bucket_bytes: the longest range averaged at once.
        reduce_dtype: the type in which values travel, if not their own.
        owners: for each parameter's id, the one who averages it, where only one may: the first of those that train it
            since all workers were the same.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        buffers_of: nn.Module | None,
        names_of: nn.Module | None,
        workers: WorkerGroup,
        bucket_bytes: int,
        exclude_buffers: Sequence[str] = (),
        reduce_dtype: torch.dtype | None = None,
        owners: "MutableMapping[int, tuple[TensorTracker, nn.Parameter]] | None" = None,
    ) -> None:
        # Configuration
        self._optimizer = optimizer
        self._buffers_of = buffers_of
        self._exclude_buffers = exclude_buffers
        self._names_of = names_of
        self._workers = workers
        self._bucket_bytes = bucket_bytes
        self._reduce_dtype = reduce_dtype
        self._owners = owners

        # State
        self._latest: AveragedTensors | None = None
        self._stepped: dict[int, nn.Parameter] = {}
        self._not_stepped: list[nn.Parameter] = []
        self._counted = 0
        self._included: dict[tuple[nn.Module, str], bool] = {}
        self._steps = 0  # since all workers were the same
        self._owned_by_others: dict[int, tuple[TensorTracker, nn.Parameter]] = {}
        self.moved_by_others = False
        """Whether an optimizer that has left a parameter to this one has stepped since all workers were the same."""
        self.note_averaged()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of the optimizer's parameters, in the order of its groups."""
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def current(self) -> AveragedTensors:
        """What a round averages now, where it is now."""
        tensors, groups = self._found()
        before = self._latest
        if before is not None and before.is_at(tensors, groups):
            return before
        members = self._named(tensors, groups)
        if before is None or not before.is_of(members):
            # What was laid out keeps its order: on one rank alone it may lie in memory in another one by now.
            known = {} if before is None else before.entries
            orders = {
                index: known[member.key].order
                for index, member in enumerate(members)
                if member.key in known and known[member.key].kind == (str(member.tensor.dtype), (*member.tensor.shape,))
            }
            layout = FlatLayout(
                [member.tensor for member in members],
                [member.group for member in members],
                orders,
                apart=self._reduce_dtype is not None,
            )
            group_count = len(self._optimizer.param_groups)
            averager = ParameterAverager(layout, group_count, self._workers, self._bucket_bytes, self._reduce_dtype)
            self._latest = AveragedTensors(members, averager, before)
        assert self._latest is not None
        return self._latest

    def rebind(self, payload: AveragedTensors) -> None:
        """Find the elements of a payload, which may not be the current one any more, where they are now."""
        if payload is not self.current():
            payload.rebind({} if self._buffers_of is None else dict(averaged_buffers(self._buffers_of)))

    @property
    def has_residual(self) -> bool:
        """Whether something that rounding has cut off has not travelled yet."""
        return self._latest is not None and self._latest.averager.has_residual

    def mark_synchronized(self) -> None:
        """Take note that what is averaged is the same on all workers."""
        self.current().start()

    def note_step(self) -> None:
        """Take note of the parameters that are being trained: by the time of the round they may be frozen, or removed.

        Adversarial networks, whose parts are frozen in turn, would otherwise drift apart. It costs something in the
        first step after a round, and then only where parameters are frozen.
        """
        self._steps += 1
        for other, parameter in self._owned_by_others.values():
            other.moved_by_others = True
            if parameter.requires_grad:
                other._stepped[id(parameter)] = parameter
        count = sum(len(group["params"]) for group in self._optimizer.param_groups)
        if count != self._counted:
            self._counted = count
            self._not_stepped = [parameter for parameter in self.parameters() if id(parameter) not in self._stepped]
        if self._not_stepped:
            self._stepped.update(
                (id(parameter), parameter) for parameter in self._not_stepped if parameter.requires_grad
            )
            self._not_stepped = [parameter for parameter in self._not_stepped if not parameter.requires_grad]

    def note_averaged(self) -> None:
        """Take note that all parameters that were trained are now the same on all workers."""
        self._stepped = {}
        self._steps = 0
        self._not_stepped = [*self.parameters()]
        self._counted = len(self._not_stepped)
        if self._owners is not None:
            mine = set(map(id, self._not_stepped))
            gone = [key for key, (owner, _) in self._owners.items() if owner is self and key not in mine]
            for key in gone:
                del self._owners[key]

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

    # Details

    def _found(self) -> tuple[list[Tensor], list[int | None]]:
        """What is averaged now, and of which parameter group each is."""
        tensors: list[Tensor] = []
        groups: list[int | None] = []
        seen: set[int] = set()
        stepped = self._stepped
        for index, group in enumerate(self._optimizer.param_groups):
            parameters = group["params"]
            if self._owners is not None:
                parameters = [parameter for parameter in parameters if self._owns(parameter)]
            trained = [each for each in parameters if each.requires_grad or id(each) in stepped]
            tensors += trained
            groups += [index] * len(trained)
            seen.update(map(id, group["params"]))
        # What is in no group any more was trained since all workers were the same: it is averaged once more.
        tensors += [each for place, each in stepped.items() if place not in seen and self._owns(each)]
        if self._buffers_of is not None:
            tensors += [buffer for *_, buffer in buffers_of(self._buffers_of, self._is_included)]
        return tensors, groups + [None] * (len(tensors) - len(groups))

    def _is_included(self, part: nn.Module, name: str) -> bool:
        if not self._exclude_buffers:
            return True
        if (part, name) not in self._included:
            assert self._buffers_of is not None
            self._included = {
                (each, own): not matches(full_name, self._exclude_buffers)
                for each, own, full_name in buffer_names(self._buffers_of)
            }
        return self._included.get((part, name), True)

    def _named(self, tensors: list[Tensor], groups: list[int | None]) -> list[_Member]:
        names: dict[int, str] = {}
        if self._buffers_of is not None:
            names.update((id(buffer), name) for name, buffer in averaged_buffers(self._buffers_of))
        if self._names_of is not None:
            names.update((id(parameter), name) for name, parameter in self._names_of.named_parameters())
        both = zip(tensors, groups, strict=True)
        return [_Member(names.get(id(tensor), id(tensor)), tensor, group) for tensor, group in both]

    def _owns(self, parameter: nn.Parameter) -> bool:
        if self._owners is None:
            return True
        owner, _ = self._owners.setdefault(id(parameter), (self, parameter))
        if owner is not self and owner._steps == 0 and self._steps > 0:
            owner = self  # the other one does not train it, and has nothing of it under way
            self._owners[id(parameter)] = (self, parameter)
        if owner is self:
            self._owned_by_others.pop(id(parameter), None)
        else:
            self._owned_by_others[id(parameter)] = (owner, parameter)
        return owner is self
