"""Averages a layout over the workers, bucket by bucket, and measures how far the workers had drifted apart."""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adpsgd.averaging.codec import Codec, DeltaCodec
from lightning_adpsgd.averaging.layout import Bucket, FlatLayout, extremes, finite
from lightning_adpsgd.averaging.scratch import BufferPool
from lightning_adpsgd.averaging.spans import span
from lightning_adpsgd.averaging.squares import add_squares, add_up, sum_of
from lightning_adpsgd.averaging.tiles import Tile
from lightning_adpsgd.averaging.update import Adopt, Update
from lightning_adpsgd.workers.contribution import Contribution
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction

# Limit on the CPU: a packed bucket should still be in the cache when it is sent.
_LONGEST_ON_CPU = 16 * 2**20  # bytes

OnDeviations = Callable[[Tile, Tensor, Tensor], None]
"""Called for each tile with this worker's values minus the mean, and with what it sent minus the mean, which adds up to
0 over the workers. Both have shape (len(tile),), and may be the same tensor."""


class Terms(NamedTuple):
    """How a round averages, and what this worker contributes."""

    contribution: Contribution
    as_it_is: bool = True
    """Whether to ignore codec and update: values are sent unencoded, and the mean is adopted."""
    report: OnDeviations | None = None
    """Receives the deviations; None: they are not needed."""


class BucketInFlight(NamedTuple):
    """A bucket that is being reduced."""

    bucket: Bucket
    reduction: Reduction
    terms: Terms
    cut_off: Tensor | None = None
    """What rounding cut off, if the encoded change of the average is sent; None if the values are sent unencoded."""
    snapshot: Tensor | None = None
    """The values that this worker sent, before rounding; None if the tensors still hold them."""


class ParameterAverager:
    """Replaces the tensors of a layout by their means over the workers, in place.

    Buckets are pipelined: while one is reduced, the next is packed, and the previous one is measured and written back.
    At most two bucket buffers exist at a time, whatever the model's size. On the CPU they are kept for the next round.

    A part of the layout can also be sent now, and its mean adopted some steps later (:meth:`send`, :meth:`adopt`). This
    takes two buffers of the part's size: one for the values that were sent, and one for their mean.

    Args:
        layout: the tensors to average.
        groups: number of parameter groups.
        workers: the workers to average over.
        bucket_bytes: size of the largest packed bucket.
        codec: encodes the change since the last average, which is sent in place of the values; None: values are sent.
        update: applied to the mean in rounds that are not averaged ``as_it_is``; None: the mean is adopted.
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
        self._buffers = BufferPool(layout, workers.device, keeps=on_cpu)

    @property
    def has_residual(self) -> bool:
        """Whether there may be a rounding residual that has not been sent yet."""
        return self.delta is not None and self.delta.has_residual

    def average(self, terms: Terms | None = None) -> Tensor:
        """Average the whole layout.

        Args:
            terms: how to average; None: all workers contribute, and codec and update are ignored.

        Returns:
            Σ ‖w̄ − w_i‖² of this worker's parameters before averaging, per parameter group; float64, shape (groups,),
            on the workers' device. The host does not wait for it.
        """
        terms = terms or Terms(self._workers.all_contribute)
        deviations: list[Tensor] = []
        in_flight: deque[BucketInFlight] = deque()
        buffers: deque[Tensor] = deque()  # of the buckets in flight
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
            in_flight.clear()  # a traceback would keep it alive after an error
            self._buffers.end_round()
        if self.delta is not None and terms.as_it_is:
            self.delta.note_all()
        return sum_of(deviations, self.groups, self._workers.device)

    def launch(self, bucket: Bucket, buffer: Tensor, terms: Terms) -> BucketInFlight:
        """Pack a bucket into ``buffer`` and start its reduction."""
        prepare_ = self._preparation(bucket, terms)
        for tile in self.layout.tiles(bucket):
            with span("pack"):
                prepare_(tile, tile.pack(buffer[tile.start : tile.stop]))
        return self._launch(bucket, buffer, self._workers, terms)

    def finish(self, in_flight: BucketInFlight) -> Tensor:
        """Wait for a bucket's mean, measure its distance from this worker's values, and write it back.

        Returns:
            Σ ‖w̄ − w_i‖² over the bucket, per parameter group; float64, shape (groups,), on the bucket's device.
        """
        report = in_flight.terms.report
        mean = self._mean(in_flight, report is not None)
        rounding = _rounding(self.delta, in_flight) if report is not None else None
        adopts = in_flight.terms.as_it_is or isinstance(self.update, Adopt)
        tiles = self.layout.tiles(in_flight.bucket)
        squares: dict[int, list[Tensor]] = defaultdict(list)
        scratch = mean.new_empty(max(map(len, tiles)))
        for tile in tiles:
            arrived = mean[tile.start : tile.stop]
            with span("measure"):
                if tile.runs:
                    # From differences: mean‖w‖² − ‖w̄‖² is noise in fp32 when the drift is small.
                    deviations = tile.difference(arrived, scratch[: len(tile)])
                    add_squares(squares, tile, deviations)
                    if report is not None:
                        _report(report, tile, deviations, rounding)
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
        """The update's result, in a new buffer; elements of no parameter group keep the mean."""
        updated = self.update.apply(bucket, mean.clone()).clone()
        position = 0
        for _, start, stop in [*self.layout.groups(bucket), (0, len(bucket), len(bucket))]:
            updated[position:start] = mean[position:start]
            position = stop
        return updated

    def _sends_change(self, bucket: Bucket, terms: Terms) -> bool:
        return self.delta is not None and not terms.as_it_is and self.delta.knows(bucket)

    def _preparation(self, bucket: Bucket, terms: Terms) -> Callable[[Tile, Tensor], object]:
        """What to do with each packed tile of a bucket, in place, before :meth:`_launch`."""
        if self._sends_change(bucket, terms):
            return lambda tile, packed: packed
        residual = None if self.delta is None else self.delta.residual(bucket)
        if residual is None:
            return lambda tile, packed: terms.contribution.part_(packed)
        return lambda tile, packed: terms.contribution.part_(packed.add_(residual[tile.start : tile.stop]))

    def _launch(self, bucket: Bucket, prepared: Tensor, workers: WorkerGroup, terms: Terms) -> BucketInFlight:
        """Start the reduction of a bucket's prepared values, which are overwritten."""
        if self.delta is not None and self._sends_change(bucket, terms):
            with span("encode"):
                reduction, cut_off = self.delta.send(bucket, prepared, workers)
            return BucketInFlight(bucket, reduction, terms, cut_off)
        return BucketInFlight(bucket, workers.sum_(prepared), terms)

    def _mean(self, in_flight: BucketInFlight, with_rounding: bool) -> Tensor:
        """Wait for a bucket's mean."""
        with span("reduce"):
            arrived = in_flight.reduction.wait()
        if self.delta is not None and in_flight.cut_off is not None:
            with span("decode"):
                return self.delta.receive(in_flight.bucket, arrived, in_flight.cut_off, with_rounding)
        if not in_flight.terms.contribution.divides:
            largest = torch.finfo(arrived.dtype).max
            for _, start, stop in self.layout.groups(in_flight.bucket):
                # The mean of finite numbers is finite, but the sum of their parts may round to infinity.
                arrived[start:stop].clamp_(-largest, largest)
        return arrived

    def _note(self, in_flight: BucketInFlight, mean: Tensor) -> None:
        if self.delta is not None and in_flight.cut_off is None:
            self.delta.note(in_flight.bucket, mean)

    def keep(self, part: int, parts: int) -> list[Tensor]:
        """Copy one of ``parts`` equal parts of the layout, bucket by bucket."""
        buckets = self.layout.cut(self._bucket_bytes, part, parts)
        return [self.layout.pack(bucket, self.layout.new_buffer(bucket, self._workers.device)) for bucket in buckets]

    def send(
        self,
        part: int,
        parts: int,
        async_group: WorkerGroup,
        before: Sequence[Tensor] | None = None,
        ahead: Sequence[float | Tensor] = (),
    ) -> tuple[list[BucketInFlight], Tensor]:
        """Start to average one of ``parts`` equal parts of the layout: its current or its extrapolated values.

        Args:
            part: index of the part, from 0.
            parts: number of parts.
            async_group: the workers, in the process group to use.
            before: the part's values before the latest step, from :meth:`keep`; None: send the current values.
            ahead: for each parameter group, how many times to add the change since ``before``.

        Returns:
            The buckets in flight, and whether all parameters in them are finite (a bool tensor of one element).
        """
        in_flight, found = [], []
        terms = Terms(async_group.all_contribute, as_it_is=False)
        for place, bucket in enumerate(self.layout.cut(self._bucket_bytes, part, parts)):
            snapshot, values = (self.layout.new_buffer(bucket, self._workers.device) for _ in range(2))
            prepare_ = self._preparation(bucket, terms)
            for tile in self.layout.tiles(bucket):
                with span("pack"):
                    mine = tile.pack(snapshot[tile.start : tile.stop])
                    if before is not None:
                        _extrapolate(tile, before[place][tile.start : tile.stop], mine, ahead)
                    prepare_(tile, values[tile.start : tile.stop].copy_(mine))
                found += [extremes(mine[start:stop]) for _, start, stop in tile.runs]
            in_flight.append(self._launch(bucket, values, async_group, terms)._replace(snapshot=snapshot))
        return in_flight, finite(found, self._workers.device)

    def adopt(self, in_flight: Sequence[BucketInFlight], moved: bool, report: OnDeviations | None = None) -> Tensor:
        """Wait for the means, and adopt them: w ← w + (w̄ − values sent), which keeps the steps taken meanwhile.

        Tensors of no parameter group (BatchNorm statistics) are overwritten by the mean: they are moving averages, and
        a correction could make a variance negative. Elements that were equal on all workers when sent are left alone.

        Args:
            in_flight: the buckets, from :meth:`send`.
            moved: whether the tensors differ from what was sent, by later steps or by extrapolation. If not, everything
                is overwritten with the mean, so that all workers are the same, bit for bit.
            report: called for each tile with how far this worker was from the mean.

        Returns:
            Σ ‖w̄ − w_i‖² of the values sent, per parameter group; float64, shape (groups,), on the workers' device.
        """
        deviations: list[Tensor] = []
        for part in in_flight:
            snapshot = part.snapshot
            assert snapshot is not None
            mean = self._mean(part, report is not None)
            rounding = _rounding(self.delta, part) if report is not None else None
            squares: dict[int, list[Tensor]] = defaultdict(list)
            adopts = isinstance(self.update, Adopt)
            tiles = self.layout.tiles(part.bucket)
            for tile in tiles:
                here = slice(tile.start, tile.stop)
                with span("measure"):
                    add_squares(squares, tile, torch.sub(mean[here], snapshot[here], out=snapshot[here]))
                if report is not None:
                    _report(report, tile, -snapshot[here], rounding)
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
    """What this worker sent minus what it held; the mean over the workers is the rounding error of w̄."""
    if delta is None or in_flight.cut_off is None:
        return None if delta is None else delta.residual(in_flight.bucket)
    return in_flight.cut_off


def _report(report: OnDeviations, tile: Tile, deviations: Tensor, rounding: Tensor | None) -> None:
    if tile.runs:
        report(tile, deviations, deviations if rounding is None else deviations + rounding[tile.start : tile.stop])


def _write(tile: Tile, new: Tensor, change: Tensor, moved: bool) -> None:
    """Overwrite a tile with ``new``; if it has ``moved`` since it was sent, add ``change`` (new − sent) instead."""
    with span("unpack"):
        if moved:
            tile.move(new, change)
        else:
            tile.unpack(new)


def _extrapolate(tile: Tile, earlier: Tensor, now: Tensor, ahead: Sequence[float | Tensor]) -> None:
    """Extrapolate a tile's values in place: now ← now + ahead[group] · (now − earlier)."""
    for group, start, stop in tile.runs:
        here = slice(start, stop)
        weight = torch.as_tensor(1.0 + ahead[group], dtype=now.dtype)
        torch.lerp(earlier[here], now[here], weight, out=now[here])
