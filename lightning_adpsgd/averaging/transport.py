"""How values travel: as differences from the last average in 16 bits, without losing what rounding cuts off."""

from functools import partial

import torch
from torch import Tensor

from lightning_adpsgd.averaging.layout import FlatLayout, Range
from lightning_adpsgd.averaging.workers import Reduction, Workers


class Differences:
    """Sends what has changed since the last average, rounded to 16 bits, and what rounding cut off the next time.

    All workers know the last average w̄. Worker i sends q_i = Q((w_i − w̄ + e_i) / n) and keeps the error of rounding,
    e_i ← w_i − w̄ + e_i − n·q_i. Each worker adds up its share of the elements, in the wide type, and sends the rounded
    sum s = Q(Σ_i q_i) to all; what that cuts off, n·(Σ_i q_i − s), it adds to its own error. The new average is w̄ + s.
    A change too small for the type so adds up until it is not (error feedback; Seide et al., "1-bit stochastic gradient
    descent and its application to data-parallel distributed training of speech DNNs", 2014; Karimireddy et al.,
    arXiv:1901.09847).

    It keeps two numbers per element, the average and the error, of the type in which elements are packed.

    Args:
        layout: what travels.
        dtype: ``torch.bfloat16`` or ``torch.float16``.
        device: where CPU tensors are packed.
    """

    def __init__(self, layout: FlatLayout, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        self.is_known = False
        """Whether the averages are: until then, everything travels as it is."""
        self.owes = False
        """Whether there may be errors that have not travelled yet."""
        self._layout = layout
        spaces = layout.cut_into_spaces()
        self._averages = [layout.new_buffer(space, device) for space in spaces]
        self._errors = [torch.zeros_like(average) for average in self._averages]
        self._spaces = spaces

    def start(self) -> None:
        """Take what the tensors hold now, which is the same on all workers, for the last average."""
        for space, average, error in zip(self._spaces, self._averages, self._errors, strict=True):
            self._layout.pack(space, average)
            error.zero_()
        self.note_all()

    def send(self, range_: Range, values: Tensor, workers: Workers) -> Reduction:
        """Begin to find out the average's change from the workers' ``values`` of a range."""
        self.owes = True
        average, error = self._of(range_)
        change = torch.sub(values, average).add_(error).div_(workers.count)
        rounded = self._rounded(change)
        torch.sub(change, rounded, out=error).mul_(workers.count)
        return workers.sum_rounded(rounded, partial(self._round_sum, error, workers.count), average.dtype, error)

    def receive(self, range_: Range, change: Tensor) -> Tensor:
        """The new average of a range, as a buffer of its own."""
        average, _ = self._of(range_)
        return average.add_(change).clone()

    def note_all(self) -> None:
        """Take note that everything has travelled as it is."""
        self.is_known, self.owes = True, False

    def _round_sum(self, error: Tensor, workers: int, start: int, total: Tensor) -> Tensor:
        rounded = self._rounded(total)
        error[start : start + len(total)] += (total - rounded).mul_(workers)
        return rounded

    def _rounded(self, values: Tensor) -> Tensor:
        largest = torch.finfo(self.dtype).max
        return values.clamp(-largest, largest).to(self.dtype)  # what is cut off here travels later, too

    def settle(self, range_: Range, values: Tensor) -> Tensor:
        """Add to values that are about to travel as they are what they have not told yet, in place."""
        _, error = self._of(range_)
        values.add_(error)
        error.zero_()
        return values

    def note(self, range_: Range, mean: Tensor) -> None:
        """Take note of an average that travelled as it is."""
        self._of(range_)[0].copy_(mean)

    def _of(self, range_: Range) -> tuple[Tensor, Tensor]:
        here = slice(range_.start, range_.stop)
        return self._averages[range_.space][here], self._errors[range_.space][here]
