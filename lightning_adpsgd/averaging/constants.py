"""Keeps values that are equal on all workers bit for bit; averaging could round them."""

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

_LENGTH = 4096  # elements of a block; 16 bytes are sent for each block
_NEVER_ALIKE = torch.iinfo(torch.int32).max  # in place of h and ~h: then max(h) ≠ ~max(~h)

# For these numbers of workers n, adding x/n n times gives x in any order (if |x| > 1e-37; below, x/n may be rounded).
# For others the sum is off by some units in the last place, or overflows: ten tenths of finfo(float32).min are −inf.
_EXACT = (1, 2, 4)


def is_exact(workers: int) -> bool:
    """Whether plain averaging over this many workers keeps equal values bit for bit."""
    return workers in _EXACT


class Blocks:
    """Cuts a bucket into blocks of at most 4096 elements, each within one tensor.

    Args:
        length: of the bucket.
        boundaries: positions in the bucket where a tensor begins.
        device: of the bucket's values.
    """

    def __init__(self, length: int, boundaries: Iterable[int], device: torch.device) -> None:
        self._ends = sorted({*range(_LENGTH, length, _LENGTH), *boundaries, length} - {0})
        self._device = device
        self._lengths: dict[tuple[int, int], Tensor] = {}
        step = at_once(device)
        self._slices = [self._slice(start, min(start + step, length)) for start in range(0, length, step)]

    def compare(self, values: Tensor, residual: Tensor | None, workers: WorkerGroup) -> "Comparison":
        """Start to find out which blocks are equal on all ranks.

        Args:
            values: this worker's values, contiguous, fp32 or fp64; shape (length,).
            residual: will be added to the values. A block with a nonzero residual does not count as equal. None: zeros.
            workers: all of their ranks have to call this.
        """
        prints = self.fingerprints(values)
        # All ranks have the same h if max(h) = min(h), and min(h) = ~max(~h).
        row = torch.cat([prints, ~prints])
        if residual is not None:
            bits = (residual.view(torch.int32) != 0).to(torch.int32)
            (counts,) = self._sums(bits, residual.itemsize // 4, lambda part: [part])
            row.masked_fill_((counts != 0).repeat(4), _NEVER_ALIKE)
        return Comparison(workers.largest(row), self)

    def fingerprints(self, values: Tensor) -> Tensor:
        r"""Two 32-bit hashes of each block. They depend on its bits only, so they are the same on any hardware.

        They are Σ_j f_j and Σ_j d_j f_j mod 2^32. Here f_j = f(b_j ⊕ s_j) mixes the bits b_j of the j-th 32-bit word
        like the finalizer of MurmurHash3 (Appleby, 2011); s_j and d_j are constants of position j. Blocks that differ
        in one word never collide; others collide with probability 2^−64. Sums of the bits themselves would not tell
        apart blocks that differ in signs or in powers of two.

        Returns:
            int32, shape (2 · blocks,).
        """
        salts, factors = _constants(self._device)

        def mixed(part: Tensor) -> list[Tensor]:
            words = part ^ _repeated(salts, len(part))
            for shift, factor in ((16, -2048144789), (13, -1028477387)):
                words ^= (words >> shift).bitwise_and_((1 << (32 - shift)) - 1)  # >> repeats the sign bit
                words *= factor
            return [words, words * _repeated(factors, len(part))]

        return torch.cat(self._sums(values.view(torch.int32), values.itemsize // 4, mixed))

    def lengths(self, start: int, stop: int) -> tuple[int, int, Tensor]:
        """The first and the last (exclusive) block of a part of the bucket, and how much of the part is in each."""
        first, last = self._blocks_of(start, stop)
        if (start, stop) not in self._lengths:
            edges = [start, *self._ends[first : last - 1], stop]
            self._lengths[start, stop] = torch.tensor([b - a for a, b in pairwise(edges)], device=self._device)
        return first, last, self._lengths[start, stop]

    def _slice(self, start: int, stop: int) -> tuple[int, int, int, Tensor | None]:
        """A part of the bucket: start, stop, number of blocks, and where each ends; None if all have full length."""
        first, last = self._blocks_of(start, stop)
        if (last - first) * _LENGTH == stop - start:
            return start, stop, last - first, None
        return start, stop, last - first, torch.tensor(self._ends[first:last], device=self._device) - start

    def _blocks_of(self, start: int, stop: int) -> tuple[int, int]:
        return bisect_right(self._ends, start), bisect_right(self._ends, stop - 1) + 1

    def _sums(self, bits: Tensor, words: int, of: Callable[[Tensor], list[Tensor]]) -> list[Tensor]:
        """Apply ``of`` to the 32-bit words (``words`` per element), and add up each of its results over each block."""
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
    """Tells which blocks are equal on all ranks."""

    def __init__(self, reduction: Reduction, blocks: Blocks) -> None:
        self._reduction = reduction
        self._blocks = blocks
        self._alike: Tensor | None = None

    def wait(self) -> "Comparison | None":
        """Wait for the other ranks; None if no block is equal (checked on the CPU only)."""
        largest, largest_inverse = self._reduction.wait().chunk(2)
        first, second = (largest == ~largest_inverse).chunk(2)
        self._alike = first & second
        return None if _none(self._alike) else self

    def keep(self, mine: Tensor, mean: Tensor, start: int, stop: int) -> None:
        """Overwrite ``mean`` with this worker's values in the blocks that are equal on all ranks, in place.

        Args:
            mine: this worker's values of a part of the bucket, shape (stop − start,).
            mean: their mean over the workers, shape (stop − start,).
            start: where the part begins in the bucket.
            stop: where it ends (exclusive).
        """
        assert self._alike is not None
        first, last, lengths = self._blocks.lengths(start, stop)
        alike = self._alike[first:last]
        if not _none(alike):
            torch.where(torch.repeat_interleave(alike, lengths, output_size=stop - start), mine, mean, out=mean)


def _none(alike: Tensor) -> bool:
    """Whether no block is equal, as far as the host knows without waiting for a device."""
    return alike.device.type == "cpu" and not alike.any()


@functools.cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """For each position in a block, the constants s_j and d_j (odd) of its fingerprint."""
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
