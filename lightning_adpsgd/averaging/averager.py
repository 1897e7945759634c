"""Averages a layout over the workers, range by range, and measures how far the workers had drifted apart."""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_adpsgd.averaging.layout import FlatLayout, Range, extremes
from lightning_adpsgd.averaging.transport import Differences
from lightning_adpsgd.averaging.workers import Reduction, Share, Workers

# On the CPU, shorter ranges than the longest that is allowed: what was packed is still in a cache when it is sent.
_LONGEST_ON_CPU = 16 * 2**20  # bytes

# Elements that are measured and written back at once: few enough for a CPU's cache, enough for a GPU's kernel.
_MEASURED_AT_ONCE = {"cpu": 1 << 18}
_MEASURED_AT_ONCE_ELSEWHERE = 1 << 22


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
        workers: Workers,
        bucket_bytes: int,
        reduce_dtype: torch.dtype | None = None,
    ) -> None:
        self.differences = None if reduce_dtype is None else Differences(layout, reduce_dtype, workers.device)
        self._layout = layout
        self._groups = groups
        self._workers = workers
        on_cpu = workers.device.type == "cpu"
        self._bucket_bytes = min(bucket_bytes, _LONGEST_ON_CPU) if on_cpu else bucket_bytes
        self._buffers: list[Tensor] | None = [] if on_cpu else None  # the system takes its time to hand out memory

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
        buffers: deque[Tensor] = deque()  # of what is in flight
        spare = [] if self._buffers is None else self._buffers
        try:
            for range_ in self._layout.cut(self._bucket_bytes):
                if len(in_flight) == 2:
                    deviations.append(self.finish(in_flight.popleft()))
                    spare.append(buffers.popleft())
                buffers.append(self._buffer_for(range_, spare))
                in_flight.append(self.launch(range_, buffers[-1][: len(range_)], share, as_it_is))
            deviations += [self.finish(oldest) for oldest in in_flight]
            spare += buffers
        finally:
            in_flight.clear()  # after an error, a traceback would hold on to what is under way
        if self.differences is not None and (as_it_is or not self.differences.is_known):
            self.differences.note_all()
        total = torch.zeros(self._groups, dtype=torch.float64)
        for part in deviations:
            total += part.cpu()
        return total

    def launch(self, range_: Range, buffer: Tensor, share: Share | None = None, as_it_is: bool = True) -> InFlight:
        """Pack a range into ``buffer`` and begin to average it."""
        if self.differences is None:
            # Dividing first keeps the sum within the range of the workers' own values: it cannot overflow.
            share = share or self._workers.everybody
            packed = self._layout.pack(range_, buffer, divisor=share.contributors)
            return InFlight(range_, self._workers.sum_(packed if share.contributes else packed.zero_()))
        packed = self._layout.pack(range_, buffer)
        return InFlight(range_, *self._launch(range_, packed, self._workers, share, as_it_is))

    def finish(self, in_flight: InFlight) -> Tensor:
        """Wait for a range's mean, measure its distance from this worker's values, and write it back.

        Returns:
            Σ ‖w̄ − w_i‖² over the range, per parameter group; float64, shape (groups,), on the range's device.
        """
        mean = self._mean(in_flight)
        range_ = in_flight.range
        deviations = torch.zeros(self._groups, dtype=torch.float64, device=mean.device)
        at_once = _measured_at_once(mean.device)
        scratch = mean.new_empty(min(len(range_), at_once))
        for chunk in range_.chunks(at_once):
            arrived = mean[chunk.start - range_.start : chunk.stop - range_.start]
            runs = self._layout.groups(chunk)
            if runs:
                # By differences, never as mean‖w‖² − ‖w̄‖², which is noise in fp32 when the drift is small.
                difference = self._layout.difference(chunk, arrived, scratch[: len(chunk)])
                for group, start, stop in runs:
                    part = difference[start:stop]
                    deviations[group] += torch.dot(part, part)
            self._layout.unpack(chunk, arrived)
        return deviations

    def _buffer_for(self, range_: Range, spare: list[Tensor]) -> Tensor:
        """A spare buffer that fits, or a new one: two of the longest range are enough."""
        while spare:
            buffer = spare.pop()
            if self._layout.fits(range_, buffer, self._workers.device):
                return buffer
        return self._layout.new_buffer(range_, self._workers.device)

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
        snapshots, found = [], []
        ranges = self._layout.cut(self._bucket_bytes, part, parts)
        for range_ in ranges:
            snapshot = self._layout.pack(range_, self._layout.new_buffer(range_, self._workers.device))
            snapshots.append(snapshot)
            for _, start, stop in self._layout.groups(range_):
                found.append(extremes(snapshot[start:stop]).to(self._workers.device))
        in_flight = [
            InFlight(range_, *self._launch(range_, snapshot.clone(), carrier, None, as_it_is=False), snapshot)
            for range_, snapshot in zip(ranges, snapshots, strict=True)
        ]
        return in_flight, torch.isfinite(torch.stack(found)).all() if found else torch.tensor(True)

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
                for piece in difference[start:stop].split(_measured_at_once(difference.device)):
                    deviations[group] += torch.dot(piece, piece)
            if moved:
                self._layout.move(range_, mean, difference)
            else:
                self._layout.unpack(range_, mean)
        return deviations


def _measured_at_once(device: torch.device) -> int:
    return _MEASURED_AT_ONCE.get(device.type, _MEASURED_AT_ONCE_ELSEWHERE)
