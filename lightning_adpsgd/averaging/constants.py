"""What all workers hold alike stays as it is, bit for bit, where a sum of n n-th parts would be another number."""

import functools
import random
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from lightning_adpsgd.averaging.tiles import at_once
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction

_LENGTH = 4096  # elements that are compared at once: 16 bytes travel for as many
_NEVER_ALIKE = torch.iinfo(torch.int32).max  # the largest of all cannot be the inverse of the largest inverse

# For so many workers n, x/n added n times is x, whatever the order (unless x is so small that x/n is rounded, below
# 1e-37). For others it is off by some units in the last place, or overflows: ten tenths of the smallest fp32 number are
# minus infinity.
_EXACT = (1, 2, 4)


def is_exact(workers: int) -> bool:
    """Whether the mean of equal numbers of so many workers is that number, bit for bit, by itself."""
    return workers in _EXACT


class Blocks:
    """A bucket in blocks, none of which is longer than 4096 elements or has elements of two tensors.

    Args:
        length: of the bucket.
        boundaries: where in the bucket a tensor begins.
        device: where its values are.
    """

    def __init__(self, length: int, boundaries: Iterable[int], device: torch.device) -> None:
        self._ends = sorted({*range(_LENGTH, length, _LENGTH), *boundaries, length} - {0})
        self._device = device
        self._lengths: dict[tuple[int, int], Tensor] = {}
        step = at_once(device)
        self._slices = [self._slice(start, min(start + step, length)) for start in range(0, length, step)]

    def compare(self, values: Tensor, residual: Tensor | None, workers: WorkerGroup) -> "Comparison":
        """Begin to find out which blocks all ranks hold alike.

        Args:
            values: this worker's, contiguous, fp32 or fp64; shape (length,).
            residual: is to be added to them; a block where that is not 0 is not alike. None stands for zeros.
            workers: all of them have to ask.
        """
        prints = self.fingerprints(values)
        # All are the same exactly if the largest is the smallest; ~h orders them the other way round.
        row = torch.cat([prints, ~prints])
        if residual is not None:
            bits = (residual.view(torch.int32) != 0).to(torch.int32)
            (counts,) = self._sums(bits, residual.itemsize // 4, lambda part: [part])
            row.masked_fill_((counts != 0).repeat(4), _NEVER_ALIKE)
        return Comparison(workers.largest(row), self)

    def fingerprints(self, values: Tensor) -> Tensor:
        r"""Two 32-bit numbers for each block, from its bits alone: the same on any hardware.

        They are Σ_j f_j and Σ_j d_j f_j mod 2^32, where f_j = f(b_j ⊕ s_j) mixes the bits b_j of each 32-bit word, as
        the finalizer of MurmurHash3 does (Appleby, 2011), with constants s_j and d_j of its place. Blocks that differ
        in one word never have the same, others by chance, with probability 2^−64: sums of the bits themselves would
        not tell apart what differs in signs or in powers of two.

        Returns:
            int32, shape (2 · blocks,).
        """
        salts, factors = _constants(self._device)

        def mixed(part: Tensor) -> list[Tensor]:
            words = part ^ _repeated(salts, len(part))
            for shift, factor in ((16, -2048144789), (13, -1028477387)):
                words ^= (words >> shift).bitwise_and_((1 << (32 - shift)) - 1)  # a shift of signed numbers keeps signs
                words *= factor
            return [words, words * _repeated(factors, len(part))]

        return torch.cat(self._sums(values.view(torch.int32), values.itemsize // 4, mixed))

    def lengths(self, start: int, stop: int) -> tuple[int, int, Tensor]:
        """The first and the last (exclusive) of the blocks in a part of the bucket, and how much of it is in each."""
        first, last = self._blocks_of(start, stop)
        if (start, stop) not in self._lengths:
            edges = [start, *self._ends[first : last - 1], stop]
            self._lengths[start, stop] = torch.tensor([b - a for a, b in pairwise(edges)], device=self._device)
        return first, last, self._lengths[start, stop]

    def _slice(self, start: int, stop: int) -> tuple[int, int, int, Tensor | None]:
        """A part of the bucket: start, stop, blocks, and where they end; None if all have the same length."""
        first, last = self._blocks_of(start, stop)
        if (last - first) * _LENGTH == stop - start:
            return start, stop, last - first, None
        return start, stop, last - first, torch.tensor(self._ends[first:last], device=self._device) - start

    def _blocks_of(self, start: int, stop: int) -> tuple[int, int]:
        return bisect_right(self._ends, start), bisect_right(self._ends, stop - 1) + 1

    def _sums(self, bits: Tensor, words: int, of: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """What ``of`` makes of the bits (``words`` of them per element), added up over each block."""
        found: list[list[Tensor]] = []
        for start, stop, blocks, ends in self._slices:
            sums = []
            for each in of(bits[start * words : stop * words]):
                if ends is None:
                    sums.append(each.view(blocks, -1).sum(dim=1, dtype=torch.int32))
                else:
                    until = each.cumsum(dim=0, dtype=torch.int32)[ends * words - 1]
                    sums.append(torch.diff(until, prepend=until.new_zeros(1)))
            found.append(sums)
        return [torch.cat(each) for each in zip(*found, strict=True)]


class Comparison:
    """Finds out which blocks all ranks hold alike."""

    def __init__(self, reduction: Reduction, blocks: Blocks) -> None:
        self._reduction = reduction
        self._blocks = blocks
        self._alike: Tensor | None = None

    def wait(self) -> "Comparison | None":
        """Wait for the other ranks; None if it is known that no block is alike."""
        largest, largest_inverse = self._reduction.wait().chunk(2)
        first, second = (largest == ~largest_inverse).chunk(2)
        self._alike = first & second
        return None if _none(self._alike) else self

    def keep(self, mine: Tensor, mean: Tensor, start: int, stop: int) -> None:
        """Overwrite the mean of a part of the bucket by this worker's values where they are alike, in place.

        Args:
            mine: shape (stop − start,).
            mean: shape (stop − start,).
            start: where the part begins in the bucket.
            stop: where it ends.
        """
        assert self._alike is not None
        first, last, lengths = self._blocks.lengths(start, stop)
        alike = self._alike[first:last]
        if not _none(alike):
            torch.where(torch.repeat_interleave(alike, lengths, output_size=stop - start), mine, mean, out=mean)


def _none(alike: Tensor) -> bool:
    """Whether it is known, without waiting for a device, that none is."""
    return alike.device.type == "cpu" and not alike.any()


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each place, what its bits are combined with, and an odd factor."""
    numbers = random.Random(0)
    salts = [numbers.getrandbits(32) - 2**31 for _ in range(2 * _LENGTH)]
    factors = [(numbers.getrandbits(32) | 1) - 2**31 for _ in range(2 * _LENGTH)]
    both = torch.tensor([salts, factors], dtype=torch.int32, device=device)
    return both[0], both[1]


@functools.lru_cache(maxsize=64)
def _times(constants: Tensor, times: int) -> Tensor:
    return constants.repeat(times)


def _repeated(constants: Tensor, length: int) -> Tensor:
    return _times(constants, -(-length // len(constants)))[:length]
