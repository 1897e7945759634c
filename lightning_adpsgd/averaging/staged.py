"""Means in buffers of their own: nothing is overwritten before all workers are known to have all of them."""

from collections import defaultdict

from torch import Tensor

from lightning_adpsgd.averaging.averager import BucketInFlight, ParameterAverager, Terms
from lightning_adpsgd.averaging.spans import span
from lightning_adpsgd.averaging.squares import add_squares, add_up, sum_of
from lightning_adpsgd.workers.group import WorkerGroup


class StagedMeans:
    """The means of a whole layout. The constructor starts the reductions.

    The buffers come from the averager's pool. They return to it, for the next round, by :meth:`write` or
    :meth:`release`, and not before; those of a round whose reductions have failed are left to the garbage collector,
    since the backend may still write to them.

    Args:
        averager: of the layout.
        group: the workers, in the process group to use; it says what this worker contributes.

    Raises:
        CollectiveError: here and in :meth:`deviations`, if a worker is gone.
    """

    def __init__(self, averager: ParameterAverager, group: WorkerGroup) -> None:
        self._averager = averager
        self._device = group.device
        terms = Terms(group.all_contribute)
        self._in_flight: list[BucketInFlight] = []
        self._buffers: list[Tensor] = []
        for bucket in averager.cut():
            self._buffers.append(averager.buffers.lend(bucket))
            buffer = self._buffers[-1][: len(bucket)]
            self._in_flight.append(averager.launch(bucket, buffer, terms, group))

    def deviations(self) -> Tensor:
        """Wait for all means; return Σ ‖w̄ − w_i‖² of this worker, as :meth:`ParameterAverager.average` does."""
        layout, groups = self._averager.layout, self._averager.groups
        found = []
        for in_flight in self._in_flight:
            mean, tiles = self._averager.mean(in_flight), layout.tiles(in_flight.bucket)
            scratch = mean.new_empty(max(map(len, tiles)))
            squares: dict[int, list[Tensor]] = defaultdict(list)
            for tile in tiles:
                if tile.runs:
                    with span("measure"):
                        difference = tile.difference(mean[tile.start : tile.stop], scratch[: len(tile)])
                        add_squares(squares, tile, difference)
            found.append(add_up(squares, groups, mean.device))
        return sum_of(found, groups, self._device)

    def write(self) -> None:
        """Overwrite the tensors, which still hold what was sent, with their means."""
        with span("unpack"):
            for in_flight in self._in_flight:
                self._averager.layout.unpack(in_flight.bucket, self._averager.mean(in_flight))
        self.release()

    def keep_sent(self) -> None:
        """Copy the values that were sent, which the tensors still hold, because training goes on before the means."""
        layout = self._averager.layout
        self._in_flight = [
            each._replace(snapshot=layout.pack(each.bucket, layout.new_buffer(each.bucket, self._device)))
            for each in self._in_flight
        ]

    def write_late(self) -> None:
        """Adopt the means after later steps, which are kept: w ← w + (w̄ − values sent); after :meth:`keep_sent`."""
        self._averager.adopt(self._in_flight, moved=True)
        self.release()

    def release(self) -> None:
        """Give the buffers back. The means are lost."""
        self._averager.buffers.give_back(*reversed(self._buffers))  # so that each bucket gets the same one again
        self._in_flight, self._buffers = [], []
