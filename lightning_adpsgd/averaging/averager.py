"""Averages a layout over the workers, range by range, and measures how far the workers had drifted apart."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adpsgd.averaging.layout import FlatLayout, Range
from lightning_adpsgd.averaging.transport import Differences
from lightning_adpsgd.averaging.workers import Reduction, Share, Workers

# Elements whose deviation is held in memory at once: 4 MB of fp32, small enough for a cache, large enough for a kernel.
_MEASURED_AT_ONCE = 1 << 20


class InFlight(NamedTuple):
    """A range whose mean is on its way."""

    range: Range
    reduction: Reduction
    is_difference: bool = False
    """Whether what travels is the change of the average."""
    snapshot: Tensor | None = None
    """This worker's values when they were sent; None if the tensors still hold them when the mean arrives."""


class ParameterAverager:
    """Replaces the tensors of a layout by their means over the workers, in place.

    Ranges are reduced one after the other: while one travels, the next is packed and the one before is measured and
    written back. At most two buffers of a range's size are alive, whatever the model's size.

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
        workers: Workers,
        bucket_bytes: int,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self.differences = None if reduce_dtype is None else Differences(layout, reduce_dtype, workers.device)
        self._layout = layout
        self._groups = groups
        self._workers = workers
        self._bucket_bytes = bucket_bytes

    def average(self, share: Share | None = None, as_it_is: bool = True) -> Tensor:
        """Average everything.

        Args:
            share: what this worker contributes to the mean; None where all workers do.
            as_it_is: whether values travel as they are, whatever ``reduce_dtype`` says.

        Returns:
            Σ ‖w̄ − w_i‖² of this worker's parameters before averaging, per parameter group; float64, shape (groups,),
            on the CPU.
        """
        deviations: list[Tensor] = []
        in_flight: deque[InFlight] = deque()
        try:
            for range_ in self._layout.cut(self._bucket_bytes):
                buffer = None
                if len(in_flight) == 2:
                    buffer = in_flight[0].reduction.wait()
                    deviations.append(self.finish(in_flight.popleft()))
                    if not self._layout.fits(range_, buffer, self._workers.device):
                        buffer = None  # of another dtype or device: let it go before the next one is made
                if buffer is None:
                    buffer = self._layout.new_buffer(range_, self._workers.device)
                in_flight.append(self.launch(range_, buffer[: len(range_)], share, as_it_is))
            deviations += [self.finish(oldest) for oldest in in_flight]
        finally:
            in_flight.clear()  # after an error, a traceback would hold on to what is under way
        if self.differences is not None:
            self.differences.is_known = True
        total = torch.zeros(self._groups, dtype=torch.float64)
        for part in deviations:
            total += part.cpu()
        return total

    def launch(self, range_: Range, buffer: Tensor, share: Share | None = None, as_it_is: bool = True) -> InFlight:
        """Pack a range into ``buffer`` and begin to average it."""
        packed = self._layout.pack(range_, buffer)
        return InFlight(range_, *self._launch(range_, packed, self._workers, share, as_it_is))

    def finish(self, in_flight: InFlight) -> Tensor:
        """Wait for a range's mean, measure its distance from this worker's values, and write it back.

        Returns:
            Σ ‖w̄ − w_i‖² over the range, per parameter group; float64, shape (groups,), on the range's device.
        """
        mean = self._mean(in_flight)
        deviations = self._squared_deviations(in_flight.range, mean)
        self._layout.unpack(in_flight.range, mean)
        return deviations

    def _launch(
        self, range_: Range, values: Tensor, workers: Workers, share: Share | None, as_it_is: bool
    ) -> tuple[Reduction, bool]:
        if self.differences is None:
            return workers.mean_(values, share), False
        if as_it_is or not self.differences.is_known:
            return workers.mean_(self.differences.settle(range_, values), share), False
        return self.differences.send(range_, values, workers), True

    def _mean(self, in_flight: InFlight) -> Tensor:
        arrived = in_flight.reduction.wait()
        if self.differences is None:
            return arrived
        if in_flight.is_difference:
            return self.differences.receive(in_flight.range, arrived)
        self.differences.note(in_flight.range, arrived)
        return arrived

    def send(self, part: int, parts: int, carrier: Workers) -> tuple[list[InFlight], Tensor]:
        """Begin to average one of ``parts`` equal parts of the layout as it is now.

        Args:
            part: which one, from 0.
            parts: how many there are.
            carrier: the workers, on the connections that are to be used.

        Returns:
            What is in flight, and whether all parameters among it are finite (a bool tensor of one element).
        """
        snapshots, largest = [], []
        ranges = self._layout.cut(self._bucket_bytes, part, parts)
        for range_ in ranges:
            snapshot = self._layout.pack(range_, self._layout.new_buffer(range_, self._workers.device))
            snapshots.append(snapshot)
            for _, start, stop in self._layout.groups(range_):
                largest.append(torch.linalg.vector_norm(snapshot[start:stop], float("inf")).to(self._workers.device))
        in_flight = [
            InFlight(range_, *self._launch(range_, snapshot.clone(), carrier, None, as_it_is=False), snapshot)
            for range_, snapshot in zip(ranges, snapshots, strict=True)
        ]
        return in_flight, torch.isfinite(torch.stack(largest)).all() if largest else torch.tensor(True)

    def adopt(self, in_flight: Sequence[InFlight], moved: bool) -> Tensor:
        """Wait for means, and adopt them: w ← w + (w̄ − what was sent), which keeps the steps taken meanwhile.

        Tensors of no parameter group (BatchNorm statistics) take the mean as it is: they are moving averages, and a
        variance must not become negative.

        Args:
            in_flight: of :meth:`send`.
            moved: whether there were such steps. If not, everything takes the mean as it is, so that it is the same on
                all workers, bit for bit.

        Returns:
            Σ ‖w̄ − w_i‖² of what was sent, per parameter group; float64, shape (groups,), on the workers' device.
        """
        deviations = torch.zeros(self._groups, dtype=torch.float64, device=self._workers.device)
        for part in in_flight:
            range_, snapshot = part.range, part.snapshot
            assert snapshot is not None
            mean = self._mean(part)
            difference = torch.sub(mean, snapshot, out=snapshot)
            for group, start, stop in self._layout.groups(range_):
                for piece in difference[start:stop].split(_MEASURED_AT_ONCE):
                    deviations[group] += torch.dot(piece, piece)
            if moved:
                self._layout.move(range_, mean, difference)
            else:
                self._layout.unpack(range_, mean)
        return deviations

    def _squared_deviations(self, range_: Range, mean: Tensor) -> Tensor:
        # By differences, never as mean‖w‖² − ‖w̄‖², which is noise in fp32 when the drift is small.
        deviations = torch.zeros(self._groups, dtype=torch.float64, device=mean.device)
        scratch = mean.new_empty(min(len(range_), _MEASURED_AT_ONCE))
        for chunk in range_.chunks(_MEASURED_AT_ONCE):
            runs = self._layout.groups(chunk)
            if not runs:
                continue
            offset = chunk.start - range_.start
            difference = self._layout.pack(chunk, scratch[: len(chunk)]).sub_(mean[offset : offset + len(chunk)])
            for group, start, stop in runs:
                part = difference[start:stop]
                deviations[group] += torch.dot(part, part)
        return deviations
