"""Averages a layout over the workers, bucket by bucket, and measures how far the workers had drifted apart."""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adpsgd.averaging.codec import Codec, DeltaCodec
from lightning_adpsgd.averaging.layout import Bucket, FlatLayout, extremes, finite
from lightning_adpsgd.averaging.scratch import BufferPool
from lightning_adpsgd.averaging.spans import span
from lightning_adpsgd.averaging.squares import add_squares, add_up, sum_of
from lightning_adpsgd.averaging.tiles import Tile
from lightning_adpsgd.averaging.update import Adopt, Update, check_result
from lightning_adpsgd.workers.contribution import Contribution
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction

# Limit on the CPU: a packed bucket should still be in the cache when it is sent.
_LONGEST_ON_CPU = 16 * 2**20  # bytes

OnDeviations = Callable[[Tile, Tensor, Tensor], None]
"""Called for each tile with this worker's values minus the mean, and with what it sent minus the mean, which adds up to
0 over the workers. Both have shape (len(tile),), and may be the same tensor."""

OnPacked = Callable[[Tile, Tensor], None]
"""Called for each tile with its packed values, shape (len(tile),), which it may change."""


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
        self.buffers = BufferPool(layout, workers.device, keeps=on_cpu)
        """What buckets of a full round are packed into."""

    @property
    def has_residual(self) -> bool:
        """Whether there may be a rounding residual that has not been sent yet."""
        return self.delta is not None and self.delta.has_residual

    def cut(self) -> list[Bucket]:
        """The buckets of a full round."""
        return self.layout.cut(self._bucket_bytes)

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
            for bucket in self.cut():
                if len(in_flight) == 2:
                    deviations.append(self.finish(in_flight.popleft()))
                    self.buffers.give_back(buffers.popleft())
                buffers.append(self.buffers.lend(bucket))
                in_flight.append(self.launch(bucket, buffers[-1][: len(bucket)], terms))
            deviations += [self.finish(oldest) for oldest in in_flight]
            self.buffers.give_back(*buffers)
        finally:
            in_flight.clear()  # a traceback would keep it alive after an error
            self.buffers.end_round()
        if self.delta is not None and terms.as_it_is:
            self.delta.note_all()
        return sum_of(deviations, self.groups, self._workers.device)

    def launch(
        self,
        bucket: Bucket,
        buffer: Tensor,
        terms: Terms,
        group: WorkerGroup | None = None,
        snapshot: Tensor | None = None,
        on_packed: OnPacked | None = None,
    ) -> BucketInFlight:
        """Pack a bucket into ``buffer`` and start its reduction.

        Args:
            bucket: the bucket.
            buffer: shape (len(bucket),); it will be overwritten.
            terms: how to average.
            group: the workers, in the process group to use; None: those of this averager.
            snapshot: overwritten with the values that are sent, if the tensors may change before the mean arrives.
            on_packed: called for each packed tile, before anything else.
        """
        workers = group or self._workers
        sends_change = self.delta is not None and not terms.as_it_is and self.delta.knows(bucket)
        residual = None if self.delta is None or sends_change else self.delta.residual(bucket)
        for tile in self.layout.tiles(bucket):
            here = slice(tile.start, tile.stop)
            with span("pack"):
                packed = tile.pack(buffer[here])
                if on_packed is not None:
                    on_packed(tile, packed)
                if snapshot is not None:
                    snapshot[here] = packed
                if residual is not None:
                    packed.add_(residual[here])
                if not sends_change:
                    terms.contribution.part_(packed)
        if self.delta is None or not sends_change:
            return BucketInFlight(bucket, workers.sum_(buffer), terms, snapshot=snapshot)
        with span("encode"):
            reduction, cut_off = self.delta.send(bucket, buffer, workers)
        return BucketInFlight(bucket, reduction, terms, cut_off, snapshot)

    def finish(self, in_flight: BucketInFlight, moved: bool = False) -> Tensor:
        """Wait for a bucket's mean, measure its distance from this worker's values, and write it back.

        Args:
            in_flight: the bucket, from :meth:`launch`.
            moved: whether the tensors differ from the snapshot that was sent; see :meth:`adopt`.

        Returns:
            Σ ‖w̄ − w_i‖² over the bucket, per parameter group; float64, shape (groups,), on the bucket's device.
        """
        bucket, _, terms, cut_off, sent = in_flight
        mean = self.mean(in_flight)
        rounding = cut_off
        if terms.report is not None and cut_off is None and self.delta is not None:
            rounding = self.delta.residual(bucket)
        adopts = terms.as_it_is or isinstance(self.update, Adopt)
        tiles = self.layout.tiles(bucket)
        squares: dict[int, list[Tensor]] = defaultdict(list)
        scratch = mean.new_empty(max(map(len, tiles)) if sent is None else 0)
        for tile in tiles:
            arrived = mean[tile.start : tile.stop]
            with span("measure"):
                # From differences: mean‖w‖² − ‖w̄‖² is noise in fp32 when the drift is small.
                if sent is not None:
                    mine = sent[tile.start : tile.stop].sub_(arrived)
                else:
                    mine = scratch[: len(tile)]
                    if tile.runs:
                        tile.difference(arrived, mine)
                add_squares(squares, tile, mine)
                if terms.report is not None and tile.runs:
                    terms.report(tile, mine, mine if rounding is None else mine + rounding[tile.start : tile.stop])
            if adopts:
                _write(tile, arrived, mine if moved else None)
        if not adopts:
            updated = self._updated(bucket, mean)
            if sent is not None:
                sent.sub_(updated).add_(mean)
            mean = updated
            for tile in tiles:
                here = slice(tile.start, tile.stop)
                _write(tile, mean[here], sent[here] if sent is not None and moved else None)
        if self.delta is not None and cut_off is None:
            self.delta.note(bucket, mean)
        return add_up(squares, self.groups, mean.device)

    def _updated(self, bucket: Bucket, mean: Tensor) -> Tensor:
        """The update's result, in a new buffer; elements of no parameter group keep the mean."""
        updated = check_result(self.update, mean, self.update.apply(bucket, mean.clone())).clone()
        position = 0
        for _, start, stop in [*self.layout.groups(bucket), (0, len(bucket), len(bucket))]:
            updated[position:start] = mean[position:start]
            position = stop
        return updated

    def mean(self, in_flight: BucketInFlight) -> Tensor:
        """Wait for a bucket's mean; the same one if called again, unless a codec is used."""
        with span("reduce"):
            arrived = in_flight.reduction.wait()
        if self.delta is not None and in_flight.cut_off is not None:
            with span("decode"):
                with_rounding = in_flight.terms.report is not None
                return self.delta.receive(in_flight.bucket, arrived, in_flight.cut_off, with_rounding)
        if not in_flight.terms.contribution.divides:
            largest = torch.finfo(arrived.dtype).max
            for _, start, stop in self.layout.groups(in_flight.bucket):
                # The mean of finite numbers is finite, but the sum of their parts may round to infinity.
                arrived[start:stop].clamp_(-largest, largest)
        return arrived

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
        in_flight: list[BucketInFlight] = []
        found: list[Tensor] = []
        terms = Terms(async_group.all_contribute, as_it_is=False)

        def look(tile: Tile, packed: Tensor, earlier: Tensor | None) -> None:
            if earlier is not None:
                _extrapolate(tile, earlier[tile.start : tile.stop], packed, ahead)
            found.extend(extremes(packed[start:stop]) for _, start, stop in tile.runs)

        for place, bucket in enumerate(self.layout.cut(self._bucket_bytes, part, parts)):
            snapshot, buffer = (self.layout.new_buffer(bucket, self._workers.device) for _ in range(2))
            on_packed = partial(look, earlier=None if before is None else before[place])
            in_flight.append(self.launch(bucket, buffer, terms, async_group, snapshot, on_packed))
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
        deviations = [self.finish(part._replace(terms=part.terms._replace(report=report)), moved) for part in in_flight]
        return sum_of(deviations, self.groups, self._workers.device)


def _write(tile: Tile, new: Tensor, difference: Tensor | None) -> None:
    """Overwrite a tile with ``new``; if it has moved since it was sent, subtract what was sent minus ``new``."""
    with span("unpack"):
        if difference is None:
            tile.unpack(new)
        else:
            tile.move(new, difference)


def _extrapolate(tile: Tile, earlier: Tensor, now: Tensor, ahead: Sequence[float | Tensor]) -> None:
    """Extrapolate a tile's values in place: now ← now + ahead[group] · (now − earlier)."""
    for group, start, stop in tile.runs:
        here = slice(start, stop)
        weight = torch.as_tensor(1.0 + ahead[group], dtype=now.dtype)
        torch.lerp(earlier[here], now[here], weight, out=now[here])
