"""Rounds in 8 or 4 bits per element: signed integers, and scales that elements of a block share."""

from numbers import Integral

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_adpsgd.averaging import scaled_blocks
from lightning_adpsgd.averaging.codec import Codec
from lightning_adpsgd.validation import check_instance, check_int, wrong_value

_SMALLEST_UNIT = torch.finfo(torch.float32).tiny  # of a block of zeros, for example, which is divided by it
_LARGEST = torch.finfo(torch.float32).max
# Rounding to bf16 takes away one part in 257 at most. What is larger by one in 256 is rounded up, in effect.
_ROUNDED_UP = 257 / 256
_UNIT_BYTES = torch.bfloat16.itemsize
_GROUP = 16  # elements that share a scale of 4 bits
_MIDDLE = 8  # of multiples of the unit, so that less this they take 4 bits as codes do


class IntCodec(Codec):
    """Signed integers of 8 or 4 bits, from −m to m with m = 127 or 7, and a scale s that several elements share.

    An element x becomes the code round(x / s), which stands for code · s, where m · s is at least the largest absolute
    value of those that share s: each element is off by at most s / 2. Zeros stay what they are, so what does not change
    on any worker does not change at all.

    With 8 bits the elements of a block share a scale. With 4 bits those of 16 neighbours do, as the scale matters more:
    it is one of 1 to 15 times the block's unit, rounded up, which takes 4 bits. (For a normal distribution, the mean
    square error is 0.6 of what one scale per 128 elements would make it, for 6 % more bytes. Such scales of two levels
    are also those of "microscaling" formats, arXiv:2302.08007.)

    A block's scale or unit takes 2 bytes: it is a bf16 number, rounded up so that nothing is clipped. (In fp16, whose
    smallest number is 6e-8, what changes between two rounds late in a training would vanish; bf16 has the range of
    fp32.) A code times a scale is exact in fp32. Elements beyond the range of fp32 travel in several rounds.

    In a message every block is a row of bytes: the codes, the multiples of the unit, and the unit. With 4 bits, a byte
    holds two of them, one of each half of the block: first + 16 · second; a multiple as a number from −7 to 7.

    Args:
        bits: per element, 8 or 4.
        block_size: elements that have 2 bytes for a scale or unit in common. An even number; with 4 bits, a multiple of
            32. Smaller blocks err less and take more bytes: 2 / this per element, beside ``bits`` / 8.

    Raises:
        TypeError: if an argument is not an int.
        ValueError: if ``bits`` is neither 8 nor 4, or ``block_size`` is not a positive multiple of 2 or 32.
    """

    def __init__(self, bits: int = 4, block_size: int = 128) -> None:
        self.bits = int(check_instance("IntCodec", "bits", bits, Integral, "8 or 4"))
        if self.bits not in (8, 4):
            raise wrong_value("IntCodec", "bits", bits, "8 or 4")
        self.block = check_int("IntCodec", "block_size", block_size, at_least=1, at_most=2**20)
        if self.block % self._multiple:
            what = "an even number" if self.bits == 8 else f"a multiple of {self._multiple} with 4 bits"
            raise wrong_value("IntCodec", "block_size", block_size, f"{what}, for example 128")
        # Elements that share a scale; scales of a block; and the largest one, in units.
        self._group, self._largest_multiple = (self.block, 1) if self.bits == 8 else (_GROUP, 2 * _MIDDLE - 1)
        self._groups = self.block // self._group
        self._code_bytes = self.block * self.bits // 8
        scales_bytes = 0 if self.bits == 8 else self._groups // 2
        self._row_bytes = scaled_blocks.row_bytes(self._code_bytes + scales_bytes, torch.bfloat16)
        self._largest_code = 2 ** (self.bits - 1) - 1
        self._largest = self._largest_code * self._largest_multiple  # that an element can be, in units
        # The largest element is finite.
        self._largest_unit = _bf16_below(_LARGEST / self._largest)

    def __repr__(self) -> str:
        return f"IntCodec(bits={self.bits}, block_size={self.block})"

    @override
    def encode(self, values: Tensor) -> Tensor:
        blocks = values.numel() // self.block
        encoded = values.new_empty(blocks, self._row_bytes, dtype=torch.uint8).view(len(values), -1)
        self.encode_(values.clone(), encoded)
        return encoded

    @override
    def encode_(self, values: Tensor, encoded: Tensor) -> None:
        blocks, rows = values.view(-1, self.block), encoded.view(-1, self._row_bytes)
        codes = blocks.abs()
        # A pool is faster than amax() of short rows, and slower than that of long ones.
        peaks = codes.amax(dim=1, keepdim=True) if self.bits == 8 else nn.functional.max_pool1d(codes, self._group)
        units = peaks.amax(dim=1, keepdim=True).float().mul_(_ROUNDED_UP / self._largest)
        units = units.clamp_(_SMALLEST_UNIT, self._largest_unit).to(torch.bfloat16).to(values.dtype)
        multiples = peaks.div_(units * self._largest_code).ceil_().clamp_(1, self._largest_multiple)
        scales = self._of_each(units * multiples)
        torch.div(blocks, scales, out=codes).round_()
        if values.dtype == torch.float64:
            codes.clamp_(-self._largest_code, self._largest_code)  # what fp32 cannot hold
        blocks.addcmul_(codes, scales, value=-1)
        scaled_blocks.write(_in_pairs(codes) if self.bits == 4 else codes, units, rows, torch.bfloat16)
        if self.bits == 4:
            rows.view(torch.int8)[:, self._code_bytes : -_UNIT_BYTES] = _in_pairs(multiples.sub_(_MIDDLE))

    @override
    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        blocks = encoded.numel() // self._row_bytes
        values = encoded.new_zeros(blocks, self.block, dtype=dtype).view(len(encoded), -1)
        self.add_decoded_(encoded, values)
        return values

    @override
    def add_decoded_(self, encoded: Tensor, values: Tensor) -> None:
        bytes_, units = scaled_blocks.read(encoded.view(-1, self._row_bytes), torch.bfloat16)
        codes, scales = bytes_[:, : self._code_bytes].to(values.dtype), units.to(values.dtype)
        if self.bits == 8:
            values.view(-1, self.block).addcmul_(codes, scales)
            return
        multiples = torch.cat(_out_of_pairs(bytes_[:, self._code_bytes :].to(values.dtype)), dim=1)
        scales = self._of_each(multiples.add_(_MIDDLE).mul_(scales))
        halves = values.view(-1, self.block).chunk(2, dim=1), _out_of_pairs(codes), scales.chunk(2, dim=1)
        for half, each, scale in zip(*halves, strict=True):
            half.addcmul_(each, scale)

    def _of_each(self, scales: Tensor) -> Tensor:
        """The scale of each element, from one per group."""
        return scales[:, :, None].expand(-1, -1, self._group).reshape(len(scales), self.block)

    @property
    def _multiple(self) -> int:
        """That a block has to be of."""
        return 2 if self.bits == 8 else 2 * _GROUP


def _in_pairs(numbers: Tensor) -> Tensor:
    """Two whole numbers from −7 to 7 as one, of each half of a row; in the storage of the first half."""
    half = numbers.shape[1] // 2
    return numbers[:, :half].add_(numbers[:, half:], alpha=16)


def _out_of_pairs(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of rows that :func:`_in_pairs` has made one of; in the storage of ``pairs``, and a new one."""
    second = torch.mul(pairs, 1 / 16).round_()  # which takes away the first, as that is less than 8
    return pairs.sub_(second, alpha=16), second


def _bf16_below(value: float) -> float:
    """The largest bf16 number that is not larger than a positive fp32 number."""
    return (torch.tensor(value).view(torch.int32) >> 16 << 16).view(torch.float32).item()
