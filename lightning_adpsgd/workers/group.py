"""The workers and what passes between them: the one place that calls torch.distributed, and that counts bytes."""

import atexit
import contextlib
import functools
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

_SECONDS_TO_HANG_UP = 2.0
_SECONDS_TO_LET_GO = 0.05
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_OF_GRACE = 2.0


class CollectiveError(RuntimeError):
    """A collective failed or timed out: some worker is not there any more, or never came."""


class Contribution(NamedTuple):
    """What this worker contributes to a mean over the workers."""

    contributors: int
    """Workers whose values make up the mean."""
    contributes: bool
    """Whether this worker is one of them; if not, it receives the others' mean."""


class Reduction:
    """A mean over the workers that is under way; ``wait`` returns the buffer that then holds it."""

    def __init__(self, buffer: Tensor, work: "dist.Work | None") -> None:
        self._buffer = buffer
        self._work = work

    def advance(self) -> None:
        """Take the next of several phases, if there is one, which waits for the one before."""

    def wait(self) -> Tensor:
        """Wait until the buffer holds the mean (on CUDA: until the current stream may use it).

        Raises:
            CollectiveError: if it cannot.
        """
        # A connection stays open as long as anybody holds a piece of work, and a traceback holds this object.
        work, self._work = self._work, None
        try:
            if work is not None:
                with _as_collective_error():
                    work.wait()
        finally:
            del work
        return self._buffer


class RoundedReduction(Reduction):
    """A sum over the workers in two phases: each adds up its share of the elements, and all gather the rounded sums.

    Args:
        rounded: this worker's values, in a 16-bit type; shape (length,).
        round_sum: rounds this worker's share of the sum, given the place of its first element.
        dtype: in which to add.
        group: the process group; None is the default group.
    """

    def __init__(
        self,
        rounded: Tensor,
        round_sum: Callable[[int, Tensor], Tensor],
        dtype: torch.dtype,
        group: "dist.ProcessGroup | None",
    ) -> None:
        self._length, self._dtype, self._device = len(rounded), dtype, rounded.device
        self._round_sum = round_sum
        self._group = group
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        self._share = -(-self._length // size)
        self._start = min(self._length, rank * self._share)
        # As integers, of which every backend just moves the bits; from the host, which is where gloo exchanges them.
        device = "cpu" if _backend(rounded.device, group) == "gloo" else rounded.device
        padded = torch.zeros(size * self._share, dtype=rounded.dtype, device=device)
        padded[: self._length] = rounded
        self._type = rounded.dtype
        self._parts = torch.empty_like(padded)
        work = dist.all_to_all_single(self._as_bits(self._parts), self._as_bits(padded), group=group, async_op=True)
        self._sent: Tensor | None = padded  # alive while it travels
        super().__init__(padded, work)

    @override
    def advance(self) -> None:
        if self._sent is None:
            return
        super().wait()
        total = self._parts.view(-1, self._share).to(self._dtype).sum(dim=0)
        mine = torch.zeros(self._share, dtype=self._type, device=total.device)
        length = max(0, min(self._share, self._length - self._start))
        mine[:length] = self._round_sum(self._start, total[:length].to(self._device)).to(mine.device)
        self._sent = None
        self._mine = mine  # alive while it travels
        with _as_collective_error():
            self._work = dist.all_gather_into_tensor(
                self._as_bits(self._buffer), self._as_bits(mine), group=self._group, async_op=True
            )

    @override
    def wait(self) -> Tensor:
        self.advance()
        return super().wait()[: self._length].to(self._device)

    def _as_bits(self, tensor: Tensor) -> Tensor:
        return tensor.view(torch.uint8)


class Patience(NamedTuple):
    """How long to wait for what this worker's device does together with the others'.

    With NCCL, waiting for a piece of work only puts streams in order: that a worker is gone shows nowhere but in that
    the device does not come to an end.
    """

    seconds: float
    """What a collective may take, from when it was begun."""
    failed: Callable[[], str | None]
    """Says who has failed, if anybody is known to have; asked once in a while."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def wait_for(self, event: Any, begun: float) -> None:
        """Wait until the device has come to an ``event``.

        Args:
            event: a ``torch.cuda.Event``, or what has its ``query``.
            begun: when, by the clock, the collective was begun that it comes after.

        Raises:
            CollectiveError: if a worker has failed, or the time is up.
            RuntimeError: an error of this worker's own device, such as a failed assertion in a kernel.
        """
        now = started = self.clock()
        look_at = started + _SECONDS_BETWEEN_LOOKS
        who, give_up_at = None, begun + self.seconds
        while not event.query():
            if now >= give_up_at:
                raise CollectiveError(who or f"it has not ended after {now - begun:.0f} s")
            if who is None and now >= look_at:
                who, look_at = self.failed(), now + _SECONDS_BETWEEN_LOOKS
                # It may have done its part before it failed.
                give_up_at = give_up_at if who is None else min(give_up_at, now + _SECONDS_OF_GRACE)
            self.sleep(min(1e-3, (now - started) / 16))
            now = self.clock()


class HostRows:
    """Host memory for a few numbers that the device copies in its own time; each row is made once, and used again.

    Args:
        device: what copies; for a GPU, rows are page-locked.
    """

    def __init__(self, device: torch.device) -> None:
        self._page_locked = device.type == "cuda"
        self._lent: dict[int, deque[tuple[Any, Tensor]]] = {}  # by length, oldest first

    def borrow(self, length: int) -> Tensor:
        """A row (float64, shape (length,)) that nobody reads or writes any more."""
        lent = self._lent.setdefault(length, deque())
        if lent and lent[0][0].query():
            return lent.popleft()[1]
        return torch.empty(length, dtype=torch.float64, pin_memory=self._page_locked)

    def give_back(self, row: Tensor, copied: Any) -> None:
        """Have it used again once the device has come to the event ``copied``."""
        self._lent[len(row)].append((copied, row))


class Numbers:
    """A few numbers under way to all workers; ``wait`` returns them, on the CPU.

    On CUDA they are copied to the host beside what the device has to compute: nobody waits for that.
    """

    def __init__(self, numbers: Tensor, work: "dist.Work | None", patience: Patience) -> None:
        self._reduction = Reduction(numbers, work)
        self._patience = patience
        self._begun = patience.clock()
        self._arriving: tuple[Tensor, Any] | None = None
        if numbers.device.type == "cuda":
            side = _side_stream(numbers.device)
            side.wait_stream(torch.cuda.current_stream(numbers.device))
            with torch.cuda.stream(side):
                row = _host_rows(numbers.device).borrow(numbers.numel())
                row.copy_(self._reduction.wait().view(-1), non_blocking=True)
                numbers.record_stream(torch.cuda.current_stream())
                self._arriving = row, _now_on_the_device()

    def wait(self) -> Tensor:
        """All of them, as float64.

        Raises:
            CollectiveError: if they do not arrive.
            RuntimeError: if this worker's own device has failed.
        """
        if self._arriving is not None:
            (row, copied), sent = self._arriving, self._reduction.wait()
            self._patience.wait_for(copied, self._begun)
            self._reduction = Reduction(row.view(sent.shape).clone(), None)
            _host_rows(sent.device).give_back(row, copied)
            self._arriving = None
        return self._reduction.wait().cpu()


class WorkerGroup:
    """The workers whose replicas are averaged: one per rank, or one per node (:class:`NodeWorkerGroup`).

    Without an initialized process group there is one worker, and nothing is ever sent.

    Args:
        group: the process group; None is the default group.
        device: where small tensors are made; with NCCL it has to be this rank's GPU.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None, device: torch.device | str = "cpu") -> None:
        self._group: Any = group
        self.device = torch.device(device)
        connected = dist.is_available() and dist.is_initialized()
        # Processes, of which a worker may have several
        self.size: int = dist.get_world_size(group) if connected else 1
        self.rank: int = dist.get_rank(group) if connected else 0
        self._opened: list[Any] = []  # process groups, to be closed
        self._store = _store()  # kept, as hanging up takes it from the process group
        self._has_stayed = False
        self._seconds = _patience_seconds(self.device) if self.size > 1 else math.inf
        self._counted = _Counted()

    @property
    def payload_bytes(self) -> int:
        """Bytes of all tensors that this rank has put into collectives since the start."""
        return self._counted.payload_bytes

    def new_async_group(self) -> "WorkerGroup":
        """The same workers, on connections where nothing else travels; bytes are counted together. All have to ask.

        What is under way there cannot meet what is sent here in the meantime.
        """
        if self.size == 1:
            return self
        group = _new_group([self._global_rank(rank) for rank in range(self.size)], self.device)
        other = WorkerGroup(group, self.device)
        other._counted = self._counted
        other._opened = [group]
        return other

    def close(self) -> None:
        """Close the connections that were opened for these workers alone, after which these are of no use.

        Waits for nobody, and leaves alone the process group that the caller has given.
        """
        opened, self._opened = self._opened, []
        if self._group in opened:
            self._group = _Closed()
        if opened:
            _in_a_while(partial(_close, opened))

    @property
    def count(self) -> int:
        """How many workers there are."""
        return self.size

    def worker_of(self, rank: int) -> int:
        """The worker that a rank belongs to."""
        return rank

    @property
    def everybody(self) -> Contribution:
        """The share of a mean that all workers contribute to."""
        return Contribution(self.count, True)

    def mean_(self, buffer: Tensor, share: Contribution | None = None) -> Reduction:
        """Begin to replace ``buffer`` (contiguous, fp32 or fp64) by its mean over the workers that contribute."""
        if self.count == 1:
            return Reduction(buffer, None)
        share = share or self.everybody
        if share.contributes:
            # Dividing first keeps the sum within the range of the workers' own values: it cannot overflow.
            buffer.div_(share.contributors)
        else:
            buffer.zero_()
        return self.sum_(buffer)

    def sum_(self, buffer: Tensor) -> Reduction:
        """Begin to replace ``buffer`` (contiguous) by its sum over the workers."""
        return Reduction(buffer, self._all_reduce(buffer) if self.count > 1 else None)

    def largest(self, buffer: Tensor) -> Reduction:
        """Begin to replace ``buffer`` (contiguous, integers) by the largest that any rank has of each element."""
        work = self._all_reduce(buffer, op=dist.ReduceOp.MAX) if self.size > 1 else None
        return Reduction(buffer, work)

    def sum_rounded(
        self, rounded: Tensor, round_sum: Callable[[int, Tensor], Tensor], dtype: torch.dtype, debts: Tensor
    ) -> Reduction:
        """Begin to add up what is in a 16-bit type, in a wider one (see :class:`RoundedReduction`).

        Args:
            rounded: this worker's values, in a 16-bit type; shape (length,).
            round_sum: rounds this rank's share of the sum, given the place of its first element.
            dtype: in which to add.
            debts: where ``round_sum`` keeps what it cuts off; shape (length,). When the sum has arrived, all ranks of
                a worker hold the same there.
        """
        self._count(rounded)
        with _as_collective_error():
            return RoundedReduction(rounded, round_sum, dtype, self._group)

    def mean(self, values: "Sequence[float | Tensor] | Tensor", share: Contribution | None = None) -> Tensor:
        """The mean of a few numbers over the workers that contribute, as float64 on the CPU."""
        return self.launch_mean(values, share).wait()

    def launch_mean(self, values: "Sequence[float | Tensor] | Tensor", share: Contribution | None = None) -> Numbers:
        """Begin to find out a :meth:`mean`; values may be tensors of one element, which the host need not know."""
        share = share or self.everybody
        # Over all ranks, so that ranks of one worker, too, have the same numbers, bit for bit.
        ranks_per_worker = self.size // self.count
        row = self._row(values)
        if share.contributes:
            row.div_(share.contributors * ranks_per_worker)
        else:
            row.zero_()  # what it holds may not be finite
        return Numbers(row, self._all_reduce(row) if self.size > 1 else None, self.patience)

    def table(self, row: Sequence[float]) -> Tensor:
        """Every worker's ``row``, as a float64 tensor of shape (workers, len(row)) on the CPU.

        Integers up to 2⁵³ arrive as they were sent.
        """
        return self.launch_table(row).wait()

    def launch_table(self, row: "Sequence[float | Tensor]") -> Numbers:
        """Begin to fill a :meth:`table`; entries may be tensors of one element, which the host need not know."""
        table = torch.zeros(self.size, len(row), dtype=torch.float64, device=self.device)
        table[self.rank] = self._row(row)
        # An all-reduce in which everybody else adds zeros: every backend has it, and it costs what the ring costs.
        return Numbers(table, self._all_reduce(table) if self.size > 1 else None, self.patience)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every worker's ``value``, in order of rank. For error messages; not counted as payload."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _as_collective_error():
            dist.all_gather_object(values, value, group=self._group)
        return values

    def broadcast_object(self, value: Any, source: int) -> Any:
        """The ``value`` of one worker, on all. For what is rare and no tensor; not counted as payload."""
        if self.size == 1:
            return value
        values = [value]
        with _as_collective_error():
            dist.broadcast_object_list(values, self._global_rank(source), group=self._group)
        return values[0]

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite ``tensors`` with those of the first worker."""
        if self.size == 1:
            return
        for tensor in tensors:
            mine = tensor.data
            mine = mine[tuple(0 if stride == 0 else slice(None) for stride in mine.stride())]  # expanded: one of each
            packed = mine.resolve_conj().resolve_neg().contiguous()
            if packed.numel() == 0:
                continue
            self._count(packed)
            with _as_collective_error():
                # As bytes: backends refuse some types, such as int16 or those of 8-bit floats.
                dist.broadcast(packed.view(-1).view(torch.uint8), self._global_rank(0), group=self._group)
            if packed is not mine:
                mine.copy_(packed)

    # What can be said when collectives cannot be relied on any more

    def post_status(self, text: str, failed: bool = False) -> None:
        """Leave a line for the other workers to find in :meth:`words`. Waits for nobody, and never fails.

        Args:
            text: the line.
            failed: whether this worker will take part in nothing any more, so that nobody need wait for it.
        """
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.set(_key("word", self.rank), text)
                if failed:
                    self._store.set(_key("failed", _Session.number), str(self.rank))

    @property
    def patience(self) -> Patience:
        """With which this worker waits for what its device does together with the others'."""
        return Patience(self._seconds, self._who_has_failed)

    def _who_has_failed(self) -> str | None:
        try:
            if self._store is None or not self._store.check([_key("failed", _Session.number)]):
                return None
            who = self._store.get(_key("failed", _Session.number)).decode()
        except RuntimeError:
            return "the store that rank 0 serves does not answer any more"
        return None if who == str(self.rank) else f"rank {who} has failed meanwhile"

    def words(self, seconds: float) -> tuple[dict[int, str], bool]:
        """What other workers have left, by rank, and whether the store in which they leave it has answered.

        Args:
            seconds: how long to wait for those that have left nothing yet.
        """
        words: dict[int, str] = {}
        deadline = time.monotonic() + seconds
        try:
            while self._store is not None:
                for rank in {*range(self.size)} - {self.rank, *words}:
                    if self._store.check([_key("word", rank)]):
                        words[rank] = self._store.get(_key("word", rank)).decode()
                if len(words) == self.size - 1 or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        except RuntimeError:
            return words, False  # it is served by a process that is gone
        return words, True

    def is_ending(self, rank: int) -> bool:
        """Whether another worker has left word, or is past its last round: it ends by itself. Waits for nobody."""
        with contextlib.suppress(RuntimeError):
            return self._store is not None and any(self._store.check([_key(kind, rank)]) for kind in ("word", "heard"))
        return False

    def clear_status(self) -> None:
        """Take back what this worker has left, and what others have failed in; all workers have to."""
        self._has_stayed = False
        _Session.number += 1
        with contextlib.suppress(RuntimeError):
            if self._store is not None:
                self._store.delete_key(_key("word", self.rank))
                self._store.delete_key(_key("heard", self.rank))

    def abort(self) -> None:
        """Close this worker's connections, so that whoever waits for it notices; :meth:`words` still work.

        With NCCL, closing would wait for what is under way: there, it is aborted.
        """
        if self.size == 1 or not dist.is_initialized():
            return
        backend = _backend(self.device)
        if backend == "gloo":
            _in_a_while(dist.destroy_process_group)
        elif backend == "nccl":
            _in_a_while(dist.distributed_c10d._abort_process_group)  # there is no public way

    def stay(self, seconds: float) -> None:
        """Wait for the others to have heard enough too, on the first worker, whose process serves the store; once."""
        if self._store is None or self._has_stayed:
            return
        self._has_stayed = True
        with contextlib.suppress(RuntimeError):
            self._store.set(_key("heard", self.rank), "")
            deadline = time.monotonic() + seconds
            others = {*range(1, self.size)} if self.rank == 0 else set()
            while others and time.monotonic() < deadline:
                others = {rank for rank in others if not self._store.check([_key("heard", rank)])}
                time.sleep(0.02)

    # Details

    def _global_rank(self, rank: int) -> int:
        return rank if self._group is None else dist.get_global_rank(self._group, rank)

    def _row(self, entries: "Sequence[float | Tensor] | Tensor") -> Tensor:
        """Numbers as a float64 tensor on the device, which nobody waits for."""
        known = [0.0 if isinstance(entry, Tensor) else float(entry) for entry in entries]
        row = torch.tensor(known, dtype=torch.float64)
        if self.device.type == "cuda":
            host = _host_rows(self.device).borrow(len(known)).copy_(row)
            row = host.to(self.device, non_blocking=True)
            _host_rows(self.device).give_back(host, _now_on_the_device())
        for place, entry in enumerate(entries):
            if isinstance(entry, Tensor):
                row[place] = entry.detach()
        return row

    def _all_reduce(
        self, tensor: Tensor, group: "dist.ProcessGroup | None" = None, op: Any = dist.ReduceOp.SUM
    ) -> "dist.Work | None":
        self._count(tensor)
        with _as_collective_error():
            return dist.all_reduce(tensor, op=op, group=group or self._group, async_op=True)

    def _count(self, tensor: Tensor) -> None:
        self._counted.payload_bytes += tensor.numel() * tensor.element_size()


class NodeWorkerGroup(WorkerGroup):
    """Workers each of which is a node: the ranks of one node hold the same replica, and send it once.

    Of every buffer, each rank of a node averages its own slice with its counterparts in the other nodes; then the
    slices are gathered inside of the node. So a node sends one buffer per ring, however many ranks it has. What passes
    inside of a node is not counted.

    Args:
        ranks_per_node: how many consecutive ranks make up a node, the same number for each.
        device: where small tensors are made; with NCCL it has to be this rank's GPU.

    Raises:
        ValueError: if the number of ranks is no multiple of it.
    """

    def __init__(self, ranks_per_node: int, device: torch.device | str = "cpu") -> None:
        super().__init__(None, device)
        if self.size % ranks_per_node != 0:
            raise ValueError(f"{self.size} ranks cannot be nodes of {ranks_per_node} ranks each.")
        self.ranks_per_node = ranks_per_node
        self._node_of_rank = [rank // ranks_per_node for rank in range(self.size)]
        self.open()

    @property
    def node(self) -> Any:
        """The process group of this rank's node."""
        return self.open()[0]

    @property
    def _counterparts(self) -> Any:
        return self.open()[1]

    def open(self) -> list[Any]:
        """The groups of this rank's node and of its counterparts in the others; all ranks have to ask."""
        if self.size == 1:
            return [None, None]
        if not self._opened:  # or not any more: a round for a checkpoint may come after the end of training
            ranks, step = range(self.size), self.ranks_per_node
            # Everybody takes part in making all of them.
            nodes = [_new_group([*ranks[first : first + step]], self.device) for first in ranks[::step]]
            counterparts = [_new_group([*ranks[place::step]], self.device) for place in ranks[:step]]
            self._opened = [nodes[self.rank // step], counterparts[self.rank % step]]
        return self._opened

    @property
    @override
    def count(self) -> int:
        return self.size // self.ranks_per_node

    @override
    def worker_of(self, rank: int) -> int:
        return self._node_of_rank[rank]

    @override
    def new_async_group(self) -> WorkerGroup:
        if self.size == 1:
            return self
        other = NodeWorkerGroup(self.ranks_per_node, self.device)
        other._counted = self._counted
        other._group = _new_group([*range(self.size)], self.device)
        other.open().append(other._group)
        return other

    @override
    def sum_(self, buffer: Tensor) -> Reduction:
        slices = buffer.tensor_split(self.ranks_per_node)
        mine = slices[self.rank % self.ranks_per_node]
        work = self._all_reduce(mine, self._counterparts) if len(mine) > 0 else None
        return _GatheredReduction(buffer, work, partial(self._gather, slices))

    @override
    def sum_rounded(
        self, rounded: Tensor, round_sum: Callable[[int, Tensor], Tensor], dtype: torch.dtype, debts: Tensor
    ) -> Reduction:
        slices = rounded.tensor_split(self.ranks_per_node)
        place = self.rank % self.ranks_per_node
        mine = slices[place]
        under_way = None
        if len(mine) > 0:
            self._count(mine)
            offset = sum(len(part) for part in slices[:place])
            with _as_collective_error():
                under_way = RoundedReduction(
                    mine, lambda start, total: round_sum(offset + start, total), dtype, self._counterparts
                )

        def gather() -> None:
            self._gather(slices)
            # The next cut may give an element to another rank of the node, which then has to know what is owed.
            self._gather(debts.tensor_split(self.ranks_per_node))

        return _GatheredReduction(rounded, None, gather, under_way, mine)

    def _gather(self, slices: Sequence[Tensor]) -> None:
        first = self.rank - self.rank % self.ranks_per_node
        works: list[Any] = [
            dist.broadcast(part, first + place, group=self.node, async_op=True)
            for place, part in enumerate(slices)
            if len(part) > 0
        ]
        for work in works:
            work.wait()


class _GatheredReduction(Reduction):
    """Slices, of which each rank of a node has reduced one."""

    def __init__(
        self,
        buffer: Tensor,
        work: "dist.Work | None",
        gather: Callable[[], None],
        under_way: Reduction | None = None,
        mine: Tensor | None = None,
    ) -> None:
        super().__init__(buffer, work)
        self._gather: Callable[[], None] | None = gather
        self._under_way, self._mine = under_way, mine

    @override
    def advance(self) -> None:
        if self._under_way is not None:
            self._under_way.advance()

    @override
    def wait(self) -> Tensor:
        buffer = super().wait()
        under_way, self._under_way = self._under_way, None
        if under_way is not None and self._mine is not None:
            self._mine.copy_(under_way.wait())
        gather, self._gather = self._gather, None
        if gather is not None:
            with _as_collective_error():
                gather()
        return buffer


class _Counted:
    payload_bytes = 0


class _Closed:
    """Stands in for a process group that was closed."""

    def __getattr__(self, name: str) -> Any:
        raise CollectiveError("these connections were closed (WorkerGroup.close)")


class _Session:
    number = 0
    """Counts the runs of this process, so that a failure in one is not taken for one in the next."""


@functools.cache
def _side_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


@functools.cache
def _host_rows(device: torch.device) -> HostRows:
    return HostRows(device)


def _now_on_the_device() -> "torch.cuda.Event":
    """An event to which the device comes after all that the current stream has to do."""
    event = torch.cuda.Event()
    event.record()
    return event


@contextlib.contextmanager
def _as_collective_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if _is_of_this_device(error):
            raise
        raise CollectiveError(str(error).splitlines()[0]) from error


def _is_of_this_device(error: RuntimeError) -> bool:
    """Whether it is this worker's own, which surfaces wherever the device is asked for something."""
    own = (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError))
    return isinstance(error, own) or str(error).startswith("CUDA error")


def _store() -> Any:
    """The key-value store that the process group was made with; it works when collectives do not."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    return dist.distributed_c10d._get_default_store()  # there is no public way to it


def _backend(device: torch.device, group: "dist.ProcessGroup | None" = None) -> str:
    """Which backend carries a device's tensors; a group may have several, and then ``get_backend`` does not say."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
    return backends.get(device.type, "")


def _new_group(ranks: list[int], device: torch.device) -> Any:
    with _as_collective_error():
        return dist.new_group(ranks, timeout=_timeout(device))


def _close(groups: list[Any]) -> None:
    while groups:
        # Its threads end with the last reference to it.
        with contextlib.suppress(RuntimeError, ValueError):  # all are closed where a worker was lost
            dist.destroy_process_group(groups.pop())


def _in_a_while(close: Callable[[], None]) -> None:
    """Close connections, in a thread of its own: it can wait for a collective that will never end."""
    closing = threading.Thread(target=close, daemon=True)
    closing.start()
    closing.join(_SECONDS_TO_HANG_UP)


def _patience_seconds(device: torch.device) -> float:
    """A little less than the backend's own time-out: when that is over, NCCL ends the process without a word."""
    try:
        seconds = _timeout(device).total_seconds()
    except (AttributeError, RuntimeError):  # another backend than gloo and NCCL
        return math.inf
    return seconds - min(0.1 * seconds, 5.0)


def _timeout(device: torch.device) -> timedelta:
    """How long collectives wait; there is no public way to it either."""
    timeout: timedelta = dist.distributed_c10d._get_default_group()._get_backend(device).options._timeout
    return timeout


def _key(kind: str, number: int) -> str:
    # torchrun may keep its store when it restarts the workers: what was said then is not meant for now.
    return f"lightning_adpsgd/{kind}/{number}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


# How it ends. A thread of gloo lets go of a collective's tensors some time after the collective is over, and needs
# Python's lock for that. If the interpreter goes down while it waits for the lock, it is ended inside of a destructor,
# and the process aborts: "terminate called without an active exception" (pytorch#190489). No thread, no abort.

_opened: "list[tuple[int, weakref.ref[Any]]]" = []


@contextlib.contextmanager
def closed_at_exit() -> Iterator[None]:
    """If the default process group is made in this context, have it closed when the script ends. No other ever is."""
    before = dist.group.WORLD if dist.is_available() else None
    yield
    made = dist.group.WORLD if dist.is_available() else None
    if made is not None and made is not before:
        _opened[:] = [(os.getpid(), weakref.ref(made))]


@atexit.register  # when this package is imported, so that it runs after what scripts and loggers register later
def _close_what_was_opened() -> None:
    if not (dist.is_available() and dist.is_initialized()):
        return
    # Threads of groups that others have made get the lock now. gloo of torch 2.4 may wait for its own threads for ever
    # if it is closed before they have let go.
    time.sleep(_SECONDS_TO_LET_GO)
    # A process that the script has forked inherits the group, but not its threads: closing would wait for them.
    if any(process == os.getpid() and made() is dist.group.WORLD for process, made in _opened):
        _in_a_while(dist.destroy_process_group)
