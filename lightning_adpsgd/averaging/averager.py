"""Averages a layout over the workers, bucket by bucket, and measures how far the workers had drifted apart."""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adpsgd.averaging.codec import Codec, DeltaCodec
from lightning_adpsgd.averaging.constants import Blocks, Comparison, is_exact
from lightning_adpsgd.averaging.layout import Bucket, FlatLayout, extremes, finite
from lightning_adpsgd.averaging.scratch import BufferPool
from lightning_adpsgd.averaging.spans import span
from lightning_adpsgd.averaging.squares import add_squares, add_up, sum_of
from lightning_adpsgd.averaging.tiles import Tile
from lightning_adpsgd.averaging.update import Adopt, Update
from lightning_adpsgd.workers.group import Contribution, WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction

# On the CPU, shorter buckets than the longest that is allowed: what was packed is still in a cache when it is sent.
_LONGEST_ON_CPU = 16 * 2**20  # bytes

OnDeviations = Callable[[Tile, Tensor], None]
"""Is told what a tile of this worker has sent, less the mean, so that workers' add up to 0; shape (len(tile),)."""


class Terms(NamedTuple):
    """How a round is averaged, and what this worker contributes."""

    contribution: Contribution
    as_it_is: bool = True
    """Whether values travel as they are, whatever the codec, and means are adopted, whatever the update."""
    told: OnDeviations | None = None


class BucketInFlight(NamedTuple):
    """A bucket whose mean is on its way."""

    bucket: Bucket
    reduction: Reduction
    terms: Terms
    cut_off: Tensor | None = None
    """What rounding cuts off, where the change of the average travels; None where values travel as they are."""
    alike: Comparison | None = None
    """What all workers hold alike; None where the mean of that is what it is, bit for bit, by itself."""
    snapshot: Tensor | None = None
    """This worker's values when they were sent; None where the tensors still hold them."""


class ParameterAverager:
    """Replaces the tensors of a layout by their means over the workers, in place.

    Buckets are reduced one after the other: while one travels, the next is packed and the one before is measured and
    written back. At most two buffers of a bucket's size are alive, whatever the model's size; on the CPU, they are kept
    for the next round.

    A part of the layout can also be sent now, and its mean adopted some steps later (:meth:`send`, :meth:`adopt`). Then
    what was sent is kept beside the mean: two buffers of the part's size.

    Args:
        layout: the tensors.
        groups: number of parameter groups.
        workers: whom to average with.
        bucket_bytes: of the longest bucket, when packed.
        codec: encodes deltas from the last average, which then travel; None: values travel as they are.
        update: what is done with the mean of rounds that are not averaged ``as_it_is``; None: it is adopted.
    """

    def __init__(
        self,
        layout: FlatLayout,
        groups: int,
        workers: WorkerGroup,
        bucket_bytes: int,
        codec: Codec | None = None,
        update: Update | None = None,
    ) -> None:
        self.delta = None if codec is None else DeltaCodec(layout, codec, workers)
        self.update = update or Adopt()
        self.update.start(layout)
        self.layout = layout
        self.groups = groups
        """Number of parameter groups."""
        self._workers = workers
        on_cpu = workers.device.type == "cpu"
        self._bucket_bytes = min(bucket_bytes, _LONGEST_ON_CPU) if on_cpu else bucket_bytes
        self._blocks: dict[Bucket, Blocks] = {}
        self._buffers = BufferPool(layout, workers.device, keeps=on_cpu)

    @property
    def has_residual(self) -> bool:
        """Whether there may be a residual of rounding that has not travelled yet."""
        return self.delta is not None and self.delta.has_residual

    def average(self, terms: Terms | None = None) -> Tensor:
        """Average everything.

        Args:
            terms: how; None: as it is, and all workers contribute.

        Returns:
            Σ ‖w̄ − w_i‖² of this worker's parameters before averaging, per parameter group; float64, shape (groups,),
            on the workers' device, which nobody waits for.
        """
        terms = terms or Terms(self._workers.all_contribute)
        deviations: list[Tensor] = []
        in_flight: deque[BucketInFlight] = deque()
        buffers: deque[Tensor] = deque()  # of what is in flight
        try:
            for bucket in self.layout.cut(self._bucket_bytes):
                if len(in_flight) == 2:
                    deviations.append(self.finish(in_flight.popleft()))
                    self._buffers.give_back(buffers.popleft())
                buffers.append(self._buffers.lend(bucket))
                in_flight.append(self.launch(bucket, buffers[-1][: len(bucket)], terms))
            deviations += [self.finish(oldest) for oldest in in_flight]
            self._buffers.give_back(*buffers)
        finally:
            in_flight.clear()  # after an error, a traceback would hold on to it
            self._buffers.end_round()
        if self.delta is not None and terms.as_it_is:
            self.delta.note_all()
        return sum_of(deviations, self.groups, self._workers.device)

    def launch(self, bucket: Bucket, buffer: Tensor, terms: Terms) -> BucketInFlight:
        """Pack a bucket into ``buffer`` and begin to average it."""
        contributes, contributors = terms.contribution.contributes, terms.contribution.contributors
        # Dividing first keeps the sum within the range of the workers' own values.
        divides = self.delta is None and is_exact(contributors)
        with span("pack"):
            packed = self.layout.pack(bucket, buffer, contributors if divides else 1)
        if divides:
            return BucketInFlight(bucket, self._workers.sum_(packed if contributes else packed.zero_()), terms)
        return self._launch(bucket, packed, self._workers, terms)

    def finish(self, in_flight: BucketInFlight) -> Tensor:
        """Wait for a bucket's mean, measure its distance from this worker's values, and write it back.

        Returns:
            Σ ‖w̄ − w_i‖² over the bucket, as :meth:`average` does, on the bucket's device.
        """
        told = in_flight.terms.told
        mean, alike = self._mean(in_flight, told is not None)
        rounding = _rounding(self.delta, in_flight) if told is not None else None
        adopts = in_flight.terms.as_it_is or isinstance(self.update, Adopt)
        tiles = self.layout.tiles(in_flight.bucket)
        squares: dict[int, list[Tensor]] = defaultdict(list)
        scratch = mean.new_empty(max(map(len, tiles)))
        for tile in tiles:
            arrived = mean[tile.start : tile.stop]
            with span("measure"):
                if alike is not None:
                    alike.keep(tile.pack(scratch[: len(tile)]), arrived, tile.start, tile.stop)
                if tile.runs:
                    # By differences, never as mean‖w‖² − ‖w̄‖², which is noise in fp32 when the drift is small.
                    deviations = tile.difference(arrived, scratch[: len(tile)])
                    add_squares(squares, tile, deviations)
                    if told is not None:
                        _tell(told, tile, deviations, rounding)
            if adopts:
                with span("unpack"):
                    tile.unpack(arrived)
        if not adopts:
            mean = self._updated(in_flight.bucket, mean)
            with span("unpack"):
                self.layout.unpack(in_flight.bucket, mean)
        self._note(in_flight, mean)
        return add_up(squares, self.groups, mean.device)

    def _updated(self, bucket: Bucket, mean: Tensor) -> Tensor:
        """What takes the place of the mean; a buffer of its own."""
        updated = self.update.apply(bucket, mean.clone()).clone()
        position = 0
        for _, start, stop in [*self.layout.groups(bucket), (0, len(bucket), len(bucket))]:
            updated[position:start] = mean[position:start]
            position = stop
        return updated

    def _launch(self, bucket: Bucket, values: Tensor, workers: WorkerGroup, terms: Terms) -> BucketInFlight:
        """Begin to average the values of a bucket, which are overwritten."""
        if self.delta is not None and not terms.as_it_is and self.delta.knows(bucket):
            with span("encode"):
                reduction, cut_off = self.delta.send(bucket, values, workers)
            return BucketInFlight(bucket, reduction, terms, cut_off)
        residual = None if self.delta is None else self.delta.residual(bucket)
        alike = None
        if not is_exact(terms.contribution.contributors):
            if bucket not in self._blocks:
                self._blocks[bucket] = Blocks(len(bucket), self.layout.boundaries(bucket), values.device)
            alike = self._blocks[bucket].compare(values, residual, workers)
        if residual is not None:
            values.add_(residual)
        return BucketInFlight(bucket, workers.mean_(values, terms.contribution), terms, alike=alike)

    def _mean(self, in_flight: BucketInFlight, tells: bool) -> tuple[Tensor, Comparison | None]:
        """A bucket's mean, and what of it all workers hold alike, so that its mean is what it is."""
        with span("reduce"):
            arrived = in_flight.reduction.wait()
        if self.delta is not None and in_flight.cut_off is not None:
            with span("decode"):
                return self.delta.receive(in_flight.bucket, arrived, in_flight.cut_off, tells), None
        if in_flight.alike is None:
            return arrived, None
        largest = torch.finfo(arrived.dtype).max
        for _, start, stop in self.layout.groups(in_flight.bucket):
            # Of finite numbers, so is the mean; a sum of n-th parts may be rounded beyond the largest.
            arrived[start:stop].clamp_(-largest, largest)
        return arrived, in_flight.alike.wait()

    def _note(self, in_flight: BucketInFlight, mean: Tensor) -> None:
        if self.delta is not None and in_flight.cut_off is None:
            self.delta.note(in_flight.bucket, mean)

    def keep(self, part: int, parts: int) -> list[Tensor]:
        """A copy of one of ``parts`` equal parts of the layout, bucket by bucket."""
        buckets = self.layout.cut(self._bucket_bytes, part, parts)
        return [self.layout.pack(bucket, self.layout.new_buffer(bucket, self._workers.device)) for bucket in buckets]

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
        terms = Terms(carrier.all_contribute, as_it_is=False)
        for place, bucket in enumerate(self.layout.cut(self._bucket_bytes, part, parts)):
            snapshot, values = (self.layout.new_buffer(bucket, self._workers.device) for _ in range(2))
            for tile in self.layout.tiles(bucket):
                with span("pack"):
                    mine = tile.pack(snapshot[tile.start : tile.stop])
                    if before is not None:
                        _extrapolate(tile, before[place][tile.start : tile.stop], mine, ahead)
                    values[tile.start : tile.stop].copy_(mine)
                found += [extremes(mine[start:stop]) for _, start, stop in tile.runs]
            in_flight.append(self._launch(bucket, values, carrier, terms)._replace(snapshot=snapshot))
        return in_flight, finite(found, self._workers.device)

    def adopt(self, in_flight: Sequence[BucketInFlight], moved: bool, told: OnDeviations | None = None) -> Tensor:
        """Wait for means, and adopt them: w ← w + (w̄ − what was sent), which keeps the steps taken meanwhile.

        Tensors of no parameter group (BatchNorm statistics) take the mean as it is: they are moving averages, and a
        variance must not become negative. What was the same on all workers when it was sent stays what it is now.

        Args:
            in_flight: of :meth:`send`.
            moved: whether there were such steps. If not, everything takes the mean as it is, so that it is the same on
                all workers, bit for bit.
            told: is told of each tile how far what this worker has sent was from the mean.

        Returns:
            Σ ‖w̄ − w_i‖² of what was sent, per parameter group; float64, shape (groups,), on the workers' device.
        """
        deviations: list[Tensor] = []
        for part in in_flight:
            snapshot = part.snapshot
            assert snapshot is not None
            mean, alike = self._mean(part, told is not None)
            rounding = _rounding(self.delta, part) if told is not None else None
            squares: dict[int, list[Tensor]] = defaultdict(list)
            adopts = isinstance(self.update, Adopt)
            tiles = self.layout.tiles(part.bucket)
            for tile in tiles:
                here = slice(tile.start, tile.stop)
                with span("measure"):
                    if alike is not None:
                        alike.keep(snapshot[here], mean[here], tile.start, tile.stop)
                    add_squares(squares, tile, torch.sub(mean[here], snapshot[here], out=snapshot[here]))
                if told is not None:
                    _tell(told, tile, -snapshot[here], rounding)
                if adopts:
                    _write(tile, mean[here], snapshot[here], moved)
            if not adopts:
                updated = self._updated(part.bucket, mean)
                snapshot.add_(updated).sub_(mean)
                mean = updated
                for tile in tiles:
                    here = slice(tile.start, tile.stop)
                    _write(tile, mean[here], snapshot[here], moved)
            self._note(part, mean)
            deviations.append(add_up(squares, self.groups, mean.device))
        return sum_of(deviations, self.groups, self._workers.device)


def _rounding(delta: DeltaCodec | None, in_flight: BucketInFlight) -> Tensor | None:
    """What this worker has sent, less what it has held; adds up to what rounding did to the mean."""
    if delta is None or in_flight.cut_off is None:
        return None if delta is None else delta.residual(in_flight.bucket)
    return in_flight.cut_off


def _tell(told: OnDeviations, tile: Tile, deviations: Tensor, rounding: Tensor | None) -> None:
    if tile.runs:
        told(tile, deviations if rounding is None else deviations + rounding[tile.start : tile.stop])


def _write(tile: Tile, new: Tensor, change: Tensor, moved: bool) -> None:
    """Overwrite a tile; if it has ``moved`` since it was sent, add what has changed since then instead."""
    with span("unpack"):
        if moved:
            tile.move(new, change)
        else:
            tile.unpack(new)


def _extrapolate(tile: Tile, earlier: Tensor, now: Tensor, ahead: Sequence[float | Tensor]) -> None:
    """Add to a tile's values, in place, the change since ``earlier`` as many times as its parameter group says."""
    for group, start, stop in tile.runs:
        here = slice(start, stop)
        weight = torch.as_tensor(1.0 + ahead[group], dtype=now.dtype)
        torch.lerp(earlier[here], now[here], weight, out=now[here])
