"""What all workers hold alike stays as it is, bit for bit, where a sum of n n-th parts would be another number."""

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_adpsgd.averaging.workers import Reduction, Workers

_LENGTH = 4096  # elements that are compared at once: 8 bytes travel for as many
_AT_ONCE = {"cpu": 1 << 16}
_AT_ONCE_ELSEWHERE = 1 << 22

# For so many workers n, x/n added n times is x, whatever the order. For others it is off by some units in the last
# place, or overflows: ten tenths of the smallest fp32 number are minus infinity.
_EXACT = (1, 2, 4)


def is_exact(workers: int) -> bool:
    """Whether the mean of equal numbers of so many workers is that number, bit for bit, by itself."""
    return workers in _EXACT


class Blocks:
    """A range in blocks, none of which is longer than 4096 elements or has elements of two tensors.

    Args:
        length: of the range.
        boundaries: where in the range a tensor begins.
    """

    def __init__(self, length: int, boundaries: Iterable[int]) -> None:
        ends = sorted({*range(_LENGTH, length, _LENGTH), *boundaries, length} - {0})
        self._ends = torch.tensor(ends)
        self._lengths = torch.diff(self._ends, prepend=torch.tensor([0]))

    def compare(self, values: Tensor, owed: Tensor | None, workers: Workers) -> "Comparison":
        """Begin to find out which blocks all ranks hold alike.

        Args:
            values: this worker's, contiguous, fp32 or fp64; shape (length,).
            owed: what is to be added to them; a block where that is not 0 is not alike. None stands for zeros.
            workers: all of them have to ask.
        """
        prints = self._fingerprints(values)
        # All are the same exactly if the largest is the smallest; ~h orders them the other way round.
        row = torch.cat([prints, ~prints])
        if owed is not None:
            owes = self._fingerprints(owed) != 0
            row.masked_fill_(owes.repeat(2), torch.iinfo(torch.int32).max)  # the largest cannot be its own inverse
        return Comparison(workers.largest(row), self._lengths)

    def _fingerprints(self, values: Tensor) -> Tensor:
        """For each block Σ_j b_j·c_j mod 2^32 over its bits as 32-bit integers: the same on any hardware.

        That three workers or more, which differ, have the same by chance is as likely as 1 : 2^64.
        """
        words = values.itemsize // 4
        bits, ends = values.view(torch.int32), self._ends * words
        at_once = words * _AT_ONCE.get(values.device.type, _AT_ONCE_ELSEWHERE)
        factors = _factors(at_once, values.device)
        found = []
        for start in range(0, len(bits), at_once):
            part = bits[start : start + at_once]
            products = part * factors[: len(part)]
            first, last = torch.searchsorted(ends, torch.tensor([start + 1, start + len(part) + 1])).tolist()
            if (last - first) * _LENGTH * words == len(part):  # of one tensor, or of some that fit
                found.append(products.view(last - first, -1).sum(dim=1, dtype=torch.int32))
                continue
            last_ones = (ends[first:last] - start - 1).to(values.device, non_blocking=True)
            sums = products.cumsum(dim=0, dtype=torch.int32)[last_ones]
            found.append(torch.diff(sums, prepend=sums.new_zeros(1)))
        return torch.cat(found)


class Comparison:
    """Which blocks are alike; on its way."""

    def __init__(self, reduction: Reduction, lengths: Tensor) -> None:
        self._reduction = reduction
        self._lengths = lengths

    def wait(self) -> Tensor | None:
        """Whether each element belongs to a block that all ranks hold alike; None if it is known that none does."""
        largest, largest_inverse = self._reduction.wait().chunk(2)
        alike = largest == ~largest_inverse
        if alike.device.type == "cpu" and not alike.any():
            return None
        lengths = self._lengths.to(alike.device)
        return torch.repeat_interleave(alike, lengths, output_size=int(self._lengths.sum()))


@functools.cache
def _factors(length: int, device: torch.device) -> Tensor:
    """Odd constants, powers of one: int32, shape (length,)."""
    factors, factor = [], 1
    for _ in range(2 * _LENGTH):
        factor = factor * 0x9E3779B1 % 2**32
        factors.append(factor - 2**32 if factor >= 2**31 else factor)
    return torch.tensor(factors, dtype=torch.int32).repeat(-(-length // len(factors)))[:length].to(device)
