"""Tracks which tensors an optimizer's rounds average, how they are laid out, and what they are called."""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import NamedTuple, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging.averager import ParameterAverager
from lightning_adpsgd.averaging.buffers import AveragedBuffers
from lightning_adpsgd.averaging.codec import Codec
from lightning_adpsgd.averaging.layout import Bucket, Described, FlatLayout
from lightning_adpsgd.averaging.tiles import Order
from lightning_adpsgd.averaging.update import Update
from lightning_adpsgd.workers.group import WorkerGroup


class _Member(NamedTuple):
    """A tensor that is averaged."""

    key: int | str
    """Identifies the tensor: its name in the module, or the ``id`` of a parameter that has no name."""
    tensor: Tensor
    group: int | None


class _LaidOut(NamedTuple):
    """Where and how a tensor is laid out."""

    bucket: Bucket
    kind: tuple[object, object]
    """Its dtype and shape."""
    order: Order


def _whereabouts(tensors: list[Tensor]) -> list[tuple[int, int, tuple[int, ...], int]]:
    """The tensors' addresses, which change if elements move in memory. Cheap; valid while the tensors are alive."""
    return [(id(tensor), tensor.data_ptr(), tensor.stride(), tensor.numel()) for tensor in tensors]


class AveragedTensors:
    """The tensors of a round in one layout, and their averager; ``before`` are those that were averaged until now."""

    def __init__(self, members: list[_Member], averager: ParameterAverager, before: "AveragedTensors | None") -> None:
        self.layout = averager.layout
        self.averager = averager
        self._groups = [member.group for member in members]
        self._before = before
        self._hold(members)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return [member.tensor for member in self._members]

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that are parameters."""
        return [tensor for tensor in self.tensors if isinstance(tensor, nn.Parameter)]

    def is_at(self, tensors: list[Tensor], groups: list[int | None]) -> bool:
        """Whether these are the same tensors and groups, and no element has moved in memory."""
        return groups == self._groups and _whereabouts(tensors) == self._whereabouts

    def is_of(self, members: list[_Member]) -> bool:
        """Whether these are the same tensors; if so, bind the layout to their current storage.

        User code may re-assign buffers and re-point ``p.data``. A tensor counts as the same if its name, its position,
        and what workers have to agree on (shape, dtype, parameter group) are the same.
        """
        names, others = ([(each.key, each.group) for each in those] for those in (members, self._members))
        if names != others or not self.layout.rebind([member.tensor for member in members]):
            return False
        self._hold(members)
        return True

    def rebind(self, buffers: Mapping[str, Tensor]) -> None:
        """Bind the layout to the tensors' current storage. Buffers are found by name: they may be re-assigned."""

        def now(key: int | str, tensor: Tensor) -> Tensor:
            return tensor if isinstance(tensor, nn.Parameter) else buffers.get(str(key), tensor)

        self._hold([_Member(key, now(key, tensor), group) for key, tensor, group in self._members])
        self.layout.rebind(self.tensors)

    def take_over(self) -> None:
        """Take over averages and residuals from the tensors ``before``, once. None of these may be in flight."""
        before, self._before = self._before, None
        if before is None or before.averager.delta is None or self.averager.delta is None:
            return
        before.take_over()
        were = before.laid_out
        both = [(were[key], now) for key, now in self.laid_out.items() if key in were]
        places = [(was.bucket, now.bucket) for was, now in both if was.kind == now.kind]
        self.averager.delta.take_over(before.averager.delta, places)
        for was, now in places:
            residual = before.averager.delta.residual(was)
            if residual is not None and self.averager.delta.residual(now) is None:
                # The tensor has left its parameter group, and is sent once more, unencoded.
                values = self.layout.pack(now, self.layout.new_buffer(now, residual.device))
                self.layout.unpack(now, values.add_(residual))

    def start(self) -> None:
        """Record that all workers hold the same values."""
        self._before = None
        if self.averager.delta is not None:
            self.averager.delta.start()

    @property
    def stated(self) -> dict[str, int]:
        """The fields of :class:`RankState` that describe these tensors in a handshake."""
        delta = self.averager.delta
        return {"fingerprint": self.layout.fingerprint, "known": 0 if delta is None else delta.fingerprint}

    def agree(self, know_the_same: bool) -> None:
        """Forget the last average unless all workers know the same one: deltas are sent relative to it."""
        if self.averager.delta is not None and not know_the_same:
            self.averager.delta.forget()

    @property
    def laid_out(self) -> dict[int | str, _LaidOut]:
        """Where and how each tensor is laid out, by its key."""
        entries = zip(self.layout.indices, self.layout.signature, self.layout.places, strict=True)
        return {
            self._members[index].key: _LaidOut(bucket, (dtype, shape), cast(Order, order))
            for index, (dtype, shape, _, order), bucket in entries
        }

    def _hold(self, members: list[_Member]) -> None:
        self._members = members
        self._whereabouts = _whereabouts(self.tensors)


class TensorTracker:
    """Tracks what a round averages, and makes a new layout when parameter groups or ``requires_grad`` have changed.

    Args:
        optimizer: its parameters are averaged.
        buffers_of: the module whose persistent floating-point buffers are averaged too, if any.
        exclude_buffers: ``fnmatch`` patterns of the names of buffers that are not averaged.
        names_of: the module that names the tensors, if any.
        workers: the workers to average over.
        bucket_bytes: size of the largest bucket.
        codec: encodes what is sent; None: values are sent unencoded.
        owners: for each parameter's id, the tracker that averages it, if only one may: the first whose optimizer has
            stepped since all workers were the same.
        update: what is done with the mean; None: it is adopted.
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
        codec: Codec | None = None,
        owners: "MutableMapping[int, tuple[TensorTracker, nn.Parameter]] | None" = None,
        update: Update | None = None,
    ) -> None:
        # Configuration
        self._optimizer = optimizer
        self._buffers = None if buffers_of is None else AveragedBuffers(buffers_of, exclude_buffers)
        self._names_of = names_of
        self._workers = workers
        self._bucket_bytes = bucket_bytes
        self._codec = codec
        self._owners = owners
        self._update = update

        # State
        self._latest: AveragedTensors | None = None
        self._stepped: dict[int, nn.Parameter] = {}
        self._not_stepped: list[nn.Parameter] = []
        self._counted = 0
        self._steps = 0  # since all workers were the same
        self._owned_by_others: dict[int, tuple[TensorTracker, nn.Parameter]] = {}
        self.moved_by_others = False
        """Whether another optimizer of a parameter averaged here has stepped since all workers were the same."""
        self.note_averaged()

    def parameters(self) -> Iterator[nn.Parameter]:
        """All of the optimizer's parameters, in the order of its groups."""
        for group in self._optimizer.param_groups:
            yield from group["params"]

    def current(self) -> AveragedTensors:
        """What a round averages now, bound to its current storage."""
        tensors, groups = self._found()
        before = self._latest
        if before is not None and before.is_at(tensors, groups):
            return before
        members = self._members(tensors, groups)
        if before is None or not before.is_of(members):
            before = self._latest = AveragedTensors(members, self._averager(members), before)
        return before

    def rebind(self, tensors: AveragedTensors) -> None:
        """Bind ``tensors``, which may no longer be the current ones, to their current storage."""
        if tensors is not self.current():
            tensors.rebind({} if self._buffers is None else self._buffers.named())

    @property
    def has_residual(self) -> bool:
        """Whether there may be a rounding residual that has not been sent yet."""
        return self._latest is not None and self._latest.averager.has_residual

    def mark_synchronized(self) -> None:
        """Record that the averaged tensors are the same on all workers."""
        self.current().start()

    def note_step(self) -> None:
        """Record which parameters are being trained: by the time of the round they may be frozen or removed.

        Otherwise the parts of a GAN, which are frozen in turn, would drift apart.
        """
        self._steps += 1
        for other, parameter in self._owned_by_others.values():
            other.moved_by_others = True
            if parameter.requires_grad:
                other._stepped[id(parameter)] = parameter
        count = sum(len(group["params"]) for group in self._optimizer.param_groups)
        if count != self._counted:
            self._counted = count
            self._not_stepped = [each for each in self.parameters() if id(each) not in self._stepped]
        if self._not_stepped:
            self._stepped.update((id(each), each) for each in self._not_stepped if each.requires_grad)
            self._not_stepped = [each for each in self._not_stepped if not each.requires_grad]

    def note_averaged(self) -> None:
        """Record that all trained parameters are now the same on all workers."""
        self._stepped = {}
        self._steps = 0
        self._not_stepped = [*self.parameters()]
        self._counted = len(self._not_stepped)
        if self._owners is not None:
            mine = set(map(id, self._not_stepped))
            for key in [key for key, (owner, _) in self._owners.items() if owner is self and key not in mine]:
                del self._owners[key]

    def describe(self, layout: FlatLayout, tensors: Sequence[Tensor]) -> list[Described]:
        """Each tensor's name, and what all workers have to agree on."""
        entries = zip(layout.indices, layout.signature, strict=True)
        return [(self.name_of(tensors[index]), *entry) for index, entry in entries]

    def name_of(self, tensor: Tensor) -> str:
        """A tensor's name for error messages."""
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

    def _averager(self, members: list[_Member]) -> ParameterAverager:
        # Keep the order of the old layout: on one rank alone, the order in memory may have changed.
        known = {} if self._latest is None else self._latest.laid_out
        orders = {
            index: known[key].order
            for index, (key, tensor, _) in enumerate(members)
            if key in known and known[key].kind == (str(tensor.dtype), tuple(tensor.shape))
        }
        tensors, groups = [each.tensor for each in members], [each.group for each in members]
        layout = FlatLayout(tensors, groups, orders, apart=self._codec is not None)
        count = len(self._optimizer.param_groups)
        return ParameterAverager(layout, count, self._workers, self._bucket_bytes, self._codec, update=self._update)

    def _found(self) -> tuple[list[Tensor], list[int | None]]:
        """The tensors to average now, and the parameter group of each."""
        tensors: list[Tensor] = []
        groups: list[int | None] = []
        stepped, seen = self._stepped, set[int]()
        for index, group in enumerate(self._optimizer.param_groups):
            parameters = group["params"]
            if self._owners is not None:
                parameters = [parameter for parameter in parameters if self._owns(parameter)]
            trained = [each for each in parameters if each.requires_grad or id(each) in stepped]
            tensors += trained
            groups += [index] * len(trained)
            seen.update(map(id, group["params"]))
        # Parameters that have left their group since all workers were the same are averaged once more.
        tensors += [each for place, each in stepped.items() if place not in seen and self._owns(each)]
        if self._buffers is not None:
            tensors += self._buffers.tensors()
        return tensors, groups + [None] * (len(tensors) - len(groups))

    def _members(self, tensors: list[Tensor], groups: list[int | None]) -> list[_Member]:
        names: dict[int, str] = {}
        if self._buffers is not None:
            names.update((id(buffer), name) for name, buffer in self._buffers.named().items())
        if self._names_of is not None:
            names.update((id(parameter), name) for name, parameter in self._names_of.named_parameters())
        found = zip(tensors, groups, strict=True)
        return [_Member(names.get(id(tensor), id(tensor)), tensor, group) for tensor, group in found]

    def _owns(self, parameter: nn.Parameter) -> bool:
        if self._owners is None:
            return True
        owner, _ = self._owners.setdefault(id(parameter), (self, parameter))
        if owner is not self and owner._steps == 0 and self._steps > 0:
            owner = self  # the other one does not train it, and has none of it in flight
            self._owners[id(parameter)] = (self, parameter)
        if owner is self:
            self._owned_by_others.pop(id(parameter), None)
        else:
            self._owned_by_others[id(parameter)] = (owner, parameter)
        return owner is self
