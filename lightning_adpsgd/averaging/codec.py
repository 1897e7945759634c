"""How values travel: as differences from the last average in 16 bits, without losing what rounding cuts off."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor

from lightning_adpsgd.averaging.layout import Bucket, FlatLayout, hash48
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction


class DeltaCodec:
    """Sends what has changed since the last average, rounded to 16 bits, and what rounding cut off the next time.

    All workers know the last average w̄. Worker i sends q_i = Q((w_i − w̄ + e_i) / n) and keeps the error of rounding,
    e_i ← w_i − w̄ + e_i − n·q_i. Each worker adds up its share of the elements, in the wide type, and sends the rounded
    sum s = Q(Σ_i q_i) to all; what that cuts off, n·(Σ_i q_i − s), it adds to its own error. The new average is w̄ + s.
    A change too small for the type so adds up until it is not (error feedback; Seide et al., "1-bit stochastic gradient
    descent and its application to data-parallel distributed training of speech DNNs", 2014; Karimireddy et al.,
    arXiv:1901.09847).

    It keeps two numbers per element, the average and the error, of the type in which elements are packed. Both change
    when a mean arrives, never before: what is sent and then thrown away leaves no trace.

    Tensors of no parameter group (BatchNorm statistics) travel as they are: they are few, a variance that is rounded
    may become negative, and a constant may be infinite.

    Args:
        layout: what travels; tensors of no group are apart.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        workers: who the values travel to; CPU tensors are packed on their device.
    """

    def __init__(self, layout: FlatLayout, dtype: torch.dtype, workers: WorkerGroup) -> None:
        self.dtype = dtype
        self._workers = workers
        self.owes = False
        """Whether there may be errors that have not travelled yet."""
        self._layout = layout
        self._spaces = {space.space: space for space in layout.cut_into_spaces() if layout.is_of_groups(space.space)}
        self._averages = {number: layout.new_buffer(space, workers.device) for number, space in self._spaces.items()}
        self._errors = {number: torch.zeros_like(average) for number, average in self._averages.items()}
        self._unknown = [*self._spaces.values()]

    @property
    def fingerprint(self) -> int:
        """A 48-bit hash of the elements of which the last average is known; workers have to agree on it."""
        return hash48(repr(self._unknown).encode())

    def knows(self, bucket: Bucket) -> bool:
        """Whether the last average of a whole range is known. If not, the range has to travel as it is."""
        return bucket.space in self._spaces and not any(bucket.overlaps(unknown) for unknown in self._unknown)

    def start(self) -> None:
        """Take what the tensors hold now, which is the same on all workers, for the last average."""
        for number, space in self._spaces.items():
            self._layout.pack(space, self._averages[number])
            self._errors[number].zero_()
        self.note_all()

    def forget(self) -> None:
        """Take note that workers do not know the same average: everything travels as it is once."""
        self._unknown = [*self._spaces.values()]

    def take_over(self, other: "DeltaCodec", places: Iterable[tuple[Bucket, Bucket]]) -> None:
        """Go on from what another layout's average and errors were.

        Args:
            other: of the layout before.
            places: of tensors that are in both: where they were, and where they are now.
        """
        for before, now in places:
            if before.space in other._spaces and now.space in self._spaces:
                self._of(now)[0].copy_(other._of(before)[0])
                self._of(now)[1].copy_(other._of(before)[1])
                if other.knows(before):
                    self._note_known(now)
        self.owes = other.owes

    def send(self, bucket: Bucket, values: Tensor, workers: WorkerGroup) -> tuple[Reduction, Tensor]:
        """Begin to find out the average's change from the workers' ``values`` of a range.

        Returns:
            What is under way, and what rounding cuts off of it, for :meth:`receive`; in the storage of ``values``.
        """
        self.owes = True
        average, error = self._of(bucket)
        change = values.sub_(average).add_(error).div_(workers.count)
        rounded = self._rounded(change)
        cut_off = change.sub_(rounded).mul_(workers.count)
        shares, residuals = workers.shares(rounded), workers.shares(cut_off)
        rows = rounded.new_zeros(workers.size, len(shares[0]))
        for row, share in zip(rows, shares, strict=True):
            row[: len(share)] = share
        combine = partial(self._combine, residuals[workers.rank], workers.count)
        sizes = [share.nbytes for share in shares]
        return workers.exchange(rows.view(torch.uint8), combine, residuals, sizes), cut_off

    def receive(self, bucket: Bucket, change: Tensor, cut_off: Tensor) -> Tensor:
        """The new average of a range, as a buffer of its own.

        Args:
            bucket: the range.
            change: the average's change, encoded; uint8, shape (ranks, bytes of a share).
            cut_off: of :meth:`send`.
        """
        average, error = self._of(bucket)
        error.copy_(cut_off)
        for row, share in zip(change.view(self.dtype), self._workers.shares(average), strict=True):
            share.add_(row[: len(share)])
        return average.clone()

    def owed(self, bucket: Bucket) -> Tensor | None:
        """What values that are about to travel as they are have not told yet: to be added to them."""
        return self._of(bucket)[1] if bucket.space in self._spaces else None

    def note(self, bucket: Bucket, mean: Tensor) -> None:
        """Take note of an average that travelled as it is."""
        if bucket.space in self._spaces:
            average, error = self._of(bucket)
            average.copy_(mean)
            error.zero_()
            self._note_known(bucket)

    def note_all(self) -> None:
        """Take note that everything has travelled as it is."""
        self._unknown, self.owes = [], False

    def _combine(self, residual: Tensor, workers: int, rows: Tensor) -> Tensor:
        """Add up one share of all workers, encoded as it is sent; what rounding cuts off goes to the residual."""
        total = rows.view(self.dtype).to(residual.dtype).sum(dim=0)
        rounded = self._rounded(total)
        residual += (total - rounded)[: len(residual)].mul_(workers)
        return rounded.view(torch.uint8)

    def _rounded(self, values: Tensor) -> Tensor:
        largest = torch.finfo(self.dtype).max
        return values.clamp(-largest, largest).to(self.dtype)  # what is cut off here travels later, too

    def _note_known(self, bucket: Bucket) -> None:
        self._unknown = [rest for unknown in self._unknown for rest in unknown.without(bucket)]

    def _of(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        here = slice(bucket.start, bucket.stop)
        return self._averages[bucket.space][here], self._errors[bucket.space][here]
