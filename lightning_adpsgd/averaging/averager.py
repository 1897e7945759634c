"""Averages a layout over the workers, range by range, and measures how far the workers had drifted apart."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adpsgd.averaging.codec import DeltaCodec
from lightning_adpsgd.averaging.constants import Alike, Blocks, Comparison, is_exact
from lightning_adpsgd.averaging.layout import Bucket, FlatLayout, Tile, extremes, finite
from lightning_adpsgd.averaging.spans import span
from lightning_adpsgd.averaging.update import Adopt, Update
from lightning_adpsgd.workers.group import Contribution, WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction

# On the CPU, shorter ranges than the longest that is allowed: what was packed is still in a cache when it is sent.
_LONGEST_ON_CPU = 16 * 2**20  # bytes


class BucketInFlight(NamedTuple):
    """A range whose mean is on its way."""

    bucket: Bucket
    reduction: Reduction
    cut_off: Tensor | None = None
    """What rounding cuts off, where the change of the average travels; None where values travel as they are."""
    exact: bool = True
    """Whether the mean of what all workers hold alike is that, bit for bit, by itself."""
    alike: Comparison | None = None
    """What all workers hold alike, if that has to be known."""
    snapshot: Tensor | None = None
    """This worker's values when they were sent; None if the tensors still hold them when the mean arrives."""


class ParameterAverager:
    """Replaces the tensors of a layout by their means over the workers, in place.

    Ranges are reduced one after the other: while one travels, the next is packed and the one before is measured and
    written back. At most two buffers of a range's size are alive, whatever the model's size; on the CPU, they are kept
    for the next round.

    A part of the layout can also be sent now, and its mean adopted some steps later (:meth:`send`, :meth:`adopt`). Then
    what was sent is kept beside the mean: two buffers of the part's size.

    Args:
        layout: the tensors.
        groups: number of parameter groups.
        workers: whom to average with.
        bucket_bytes: the longest range, in bytes when packed.
        reduce_dtype: 16-bit type in which values travel, as differences from the last average; None: as they are.
    """

    def __init__(
        self,
        layout: FlatLayout,
        groups: int,
        workers: WorkerGroup,
        bucket_bytes: int,
        reduce_dtype: torch.dtype | None = None,
        update: Update | None = None,
    ) -> None:
        self.delta = None if reduce_dtype is None else DeltaCodec(layout, reduce_dtype, workers)
        self.update = update or Adopt()
        self.update.start(layout)
        self.layout = layout
        self.groups = groups
        """Number of parameter groups."""
        self._workers = workers
        on_cpu = workers.device.type == "cpu"
        self._bucket_bytes = min(bucket_bytes, _LONGEST_ON_CPU) if on_cpu else bucket_bytes
        self._blocks: dict[Bucket, Blocks] = {}
        self._buffers: list[Tensor] | None = [] if on_cpu else None  # the system takes its time to hand out memory

    @property
    def has_residual(self) -> bool:
        """Whether something that rounding has cut off has not travelled yet."""
        return self.delta is not None and self.delta.owes

    def average(self, share: Contribution | None = None, as_it_is: bool = True) -> Tensor:
        """Average everything.

        Args:
            share: what this worker contributes to the mean; None where all workers do.
            as_it_is: whether values travel as they are, whatever ``reduce_dtype`` says.

        Returns:
            Σ ‖w̄ − w_i‖² of this worker's parameters before averaging, per parameter group; float64, shape (groups,),
            on the workers' device, which nobody waits for.
        """
        deviations: list[Tensor] = []
        in_flight: deque[BucketInFlight] = deque()
        buffers: deque[Tensor] = deque()  # of what is in flight
        spare = [] if self._buffers is None else self._buffers
        try:
            for bucket in self.layout.cut(self._bucket_bytes):
                if len(in_flight) == 2:
                    deviations.append(self.finish(in_flight.popleft(), as_it_is))
                    spare.append(buffers.popleft())
                buffers.append(self._buffer_for(bucket, spare))
                in_flight.append(self.launch(bucket, buffers[-1][: len(bucket)], share, as_it_is))
            deviations += [self.finish(oldest, as_it_is) for oldest in in_flight]
            spare += buffers
        finally:
            in_flight.clear()  # after an error, a traceback would hold on to what is under way
        if self.delta is not None and as_it_is:
            self.delta.note_all()
        total = torch.zeros(self.groups, dtype=torch.float64, device=self._workers.device)
        for part in deviations:
            total += part.to(total.device)
        return total

    def launch(
        self, bucket: Bucket, buffer: Tensor, share: Contribution | None = None, as_it_is: bool = True
    ) -> BucketInFlight:
        """Pack a range into ``buffer`` and begin to average it."""
        share = share or self._workers.all_contribute
        if self.delta is None and is_exact(share.contributors):
            # Dividing first keeps the sum within the range of the workers' own values.
            with span("pack"):
                packed = self.layout.pack(bucket, buffer, divisor=share.contributors)
            return BucketInFlight(bucket, self._workers.sum_(packed if share.contributes else packed.zero_()))
        with span("pack"):
            packed = self.layout.pack(bucket, buffer)
        return self._launch(bucket, packed, self._workers, share, as_it_is)

    def finish(self, in_flight: BucketInFlight, as_it_is: bool = True) -> Tensor:
        """Wait for a bucket's mean, measure its distance from this worker's values, and write it back.

        Returns:
            Σ ‖w̄ − w_i‖² over the bucket, per parameter group; float64, shape (groups,), on the bucket's device.
        """
        mean, alike = self._mean(in_flight)
        adopts = as_it_is or isinstance(self.update, Adopt)
        tiles = self.layout.tiles(in_flight.bucket)
        squares = _Squares(self.groups)
        scratch = mean.new_empty(max(map(len, tiles)))
        for tile in tiles:
            arrived = mean[tile.start : tile.stop]
            with span("measure"):
                if alike is not None:
                    alike.keep(tile.pack(scratch[: len(tile)]), arrived, tile.start, tile.stop)
                if tile.runs:
                    # By differences, never as mean‖w‖² − ‖w̄‖², which is noise in fp32 when the drift is small.
                    squares.add(tile, tile.difference(arrived, scratch[: len(tile)]))
            if adopts:
                with span("unpack"):
                    tile.unpack(arrived)
        if not adopts:
            mean = self._updated(in_flight.bucket, mean)
            with span("unpack"):
                self.layout.unpack(in_flight.bucket, mean)
        self._note(in_flight, mean)
        return squares.sums(mean.device)

    def _updated(self, bucket: Bucket, mean: Tensor) -> Tensor:
        """What takes the place of the mean; a buffer of its own."""
        updated = self.update.apply(bucket, mean.clone()).clone()
        position = 0
        for _, start, stop in [*self.layout.groups(bucket), (0, len(bucket), len(bucket))]:
            updated[position:start] = mean[position:start]
            position = stop
        return updated

    def _buffer_for(self, bucket: Bucket, spare: list[Tensor]) -> Tensor:
        """A spare buffer that fits, or a new one: two of the longest range are enough."""
        while spare:
            buffer = spare.pop()
            if self.layout.fits(bucket, buffer, self._workers.device):
                return buffer
        return self.layout.new_buffer(bucket, self._workers.device)

    def _launch(
        self, bucket: Bucket, values: Tensor, workers: WorkerGroup, share: Contribution | None, as_it_is: bool
    ) -> BucketInFlight:
        """Begin to average the values of a range, which are overwritten."""
        if self.delta is not None and not as_it_is and self.delta.knows(bucket):
            with span("encode"):
                return BucketInFlight(bucket, *self.delta.send(bucket, values, workers))
        owed = None if self.delta is None else self.delta.owed(bucket)
        exact = is_exact((share or workers.all_contribute).contributors)
        alike = None
        if not exact:
            if bucket not in self._blocks:
                self._blocks[bucket] = Blocks(len(bucket), self.layout.boundaries(bucket), values.device)
            alike = self._blocks[bucket].compare(values, owed, workers)
        if owed is not None:
            values.add_(owed)
        return BucketInFlight(bucket, workers.mean_(values, share), exact=exact, alike=alike)

    def _mean(self, in_flight: BucketInFlight) -> tuple[Tensor, Alike | None]:
        """A range's mean, and what of it all workers hold alike, so that its mean is what it is."""
        with span("reduce"):
            arrived = in_flight.reduction.wait()
        if self.delta is not None and in_flight.cut_off is not None:
            with span("decode"):
                return self.delta.receive(in_flight.bucket, arrived, in_flight.cut_off), None
        if not in_flight.exact:
            largest = torch.finfo(arrived.dtype).max
            for _, start, stop in self.layout.groups(in_flight.bucket):
                # Of finite numbers, so is the mean; a sum of n-th parts may be rounded beyond the largest.
                arrived[start:stop].clamp_(-largest, largest)
        return arrived, None if in_flight.alike is None else in_flight.alike.wait()

    def _note(self, in_flight: BucketInFlight, mean: Tensor) -> None:
        if self.delta is not None and in_flight.cut_off is None:
            self.delta.note(in_flight.bucket, mean)

    def keep(self, part: int, parts: int) -> list[Tensor]:
        """A copy of one of ``parts`` equal parts of the layout, range by range."""
        ranges = self.layout.cut(self._bucket_bytes, part, parts)
        return [self.layout.pack(bucket, self.layout.new_buffer(bucket, self._workers.device)) for bucket in ranges]

    def send(
        self,
        part: int,
        parts: int,
        carrier: WorkerGroup,
        before: Sequence[Tensor] | None = None,
        ahead: Sequence[float | Tensor] = (),
    ) -> tuple[list[BucketInFlight], Tensor]:
        """Begin to average one of ``parts`` equal parts of the layout as it is now, or as it is expected to be.

        Args:
            part: which one, from 0.
            parts: how many there are.
            carrier: the workers, on the connections that are to be used.
            before: what :meth:`keep` has returned before the latest step, if that is known.
            ahead: for each parameter group, how many times the change since then is expected to come once more.

        Returns:
            What is in flight, and whether all parameters among it are finite (a bool tensor of one element).
        """
        in_flight, found = [], []
        for place, bucket in enumerate(self.layout.cut(self._bucket_bytes, part, parts)):
            snapshot, values = (self.layout.new_buffer(bucket, self._workers.device) for _ in range(2))
            for tile in self.layout.tiles(bucket):
                mine = tile.pack(snapshot[tile.start : tile.stop])
                if before is not None:
                    earlier = before[place][tile.start : tile.stop]
                    for group, start, stop in tile.runs:
                        here = slice(start, stop)
                        weight = torch.as_tensor(1.0 + ahead[group], dtype=mine.dtype)
                        torch.lerp(earlier[here], mine[here], weight, out=mine[here])
                values[tile.start : tile.stop].copy_(mine)
                found += [extremes(mine[start:stop]) for _, start, stop in tile.runs]
            launched = self._launch(bucket, values, carrier, None, as_it_is=False)
            in_flight.append(launched._replace(snapshot=snapshot))
        return in_flight, finite(found, self._workers.device)

    def adopt(self, in_flight: Sequence[BucketInFlight], moved: bool) -> Tensor:
        """Wait for means, and adopt them: w ← w + (w̄ − what was sent), which keeps the steps taken meanwhile.

        Tensors of no parameter group (BatchNorm statistics) take the mean as it is: they are moving averages, and a
        variance must not become negative. What was the same on all workers when it was sent stays what it is now.

        Args:
            in_flight: of :meth:`send`.
            moved: whether there were such steps. If not, everything takes the mean as it is, so that it is the same on
                all workers, bit for bit.

        Returns:
            Σ ‖w̄ − w_i‖² of what was sent, per parameter group; float64, shape (groups,), on the workers' device.
        """
        device = self._workers.device
        deviations = torch.zeros(self.groups, dtype=torch.float64, device=device)
        for part in in_flight:
            snapshot = part.snapshot
            assert snapshot is not None
            mean, alike = self._mean(part)
            squares = _Squares(self.groups)
            for tile in self.layout.tiles(part.bucket):
                here = slice(tile.start, tile.stop)
                if alike is not None:
                    alike.keep(snapshot[here], mean[here], tile.start, tile.stop)
                difference = torch.sub(mean[here], snapshot[here], out=snapshot[here])
                squares.add(tile, difference)
                if moved:
                    tile.move(mean[here], difference)
                else:
                    tile.unpack(mean[here])
            self._note(part, mean)
            deviations += squares.sums(mean.device).to(device)
        return deviations


class _Squares:
    """Sums of squares per parameter group: short ones in fp32, their sum in float64."""

    def __init__(self, groups: int) -> None:
        self._found: list[list[Tensor]] = [[] for _ in range(groups)]

    def add(self, tile: Tile, values: Tensor) -> None:
        """Add the squares of a tile's values that belong to parameter groups."""
        for group, start, stop in tile.runs:
            part = values[start:stop]
            self._found[group].append(torch.dot(part, part))

    def sums(self, device: torch.device) -> Tensor:
        """Float64, shape (groups,), on ``device``, where the values were."""
        sums = torch.zeros(len(self._found), dtype=torch.float64, device=device)
        for group, found in enumerate(self._found):
            if found:
                sums[group] = torch.stack(found).double().sum()
        return sums
