"""Rounds in 8 or 4 bits per element: signed integers, and scales that the elements of a block share."""

from numbers import Integral

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_adpsgd.averaging import scaled_blocks
from lightning_adpsgd.averaging.codec import Codec
from lightning_adpsgd.validation import check_instance, check_int, wrong_value

_SMALLEST_UNIT = torch.finfo(torch.float32).tiny  # a block of zeros is divided by its unit, too
_LARGEST = torch.finfo(torch.float32).max
# bf16 rounds a number down by one part in 257 at most. Enlarged by one in 256 first, it is rounded up, in effect.
_ROUNDED_UP = 257 / 256
_GROUP = 16  # elements that share a 4-bit scale
_MIDDLE = 8  # subtracted from multiples 1 … 15, to store them in 4 bits like codes


class IntCodec(Codec):
    """Signed integers of 8 or 4 bits, from −m to m with m = 127 or 7, and scales s that several elements share.

    An element x is encoded as round(x / s), and decoded as that times s. Since m · s is at least the largest absolute
    value among the elements that share s, each decoded element is off by at most s / 2. Zeros stay zeros, so what
    changes on no worker does not change at all.

    With 8 bits, all elements of a block share one scale. With 4 bits, where the scale matters more, 16 neighbours do:
    their scale is 1 to 15 times the block's unit, rounded up; the multiple takes 4 bits. (For a normal distribution,
    the mean square error is 0.6 times that of one scale per 128 elements, for 6 % more bytes. Scales of two levels are
    also used by "microscaling" formats, arXiv:2302.08007.)

    A block's scale or unit takes 2 bytes: a bf16 number, rounded up so that nothing is clipped. (The smallest fp16
    number is 6e-8, so late in training the changes between two rounds would vanish; bf16 has the range of fp32.) A code
    times a scale is exact in fp32. Elements beyond the range of fp32 are sent over several rounds.

    A block is sent as a row of bytes: the codes, the multiples of the unit, and the unit. With 4 bits, a byte holds two
    codes, one from each half of the block, as first + 16 · second; likewise two multiples, less 8 each.

    Args:
        bits: per element, 8 or 4.
        block_size: elements that share a 2-byte scale or unit. An even number; with 4 bits, a multiple of 32. Smaller
            blocks reduce the error and take more bytes: 2 / ``block_size`` per element on top of ``bits`` / 8.

    Raises:
        TypeError: if an argument is not an int.
        ValueError: if ``bits`` is neither 8 nor 4, or ``block_size`` is not a positive multiple of 2 or 32.
    """

    def __init__(self, bits: int = 4, block_size: int = 128) -> None:
        self.bits = int(check_instance("IntCodec", "bits", bits, Integral, "8 or 4"))
        if self.bits not in (8, 4):
            raise wrong_value("IntCodec", "bits", bits, "8 or 4")
        self.block = check_int("IntCodec", "block_size", block_size, at_least=1, at_most=2**20)
        self._format = _Int8(self.block) if self.bits == 8 else _Int4(self.block)
        if self.block % self._format.divisor:
            raise wrong_value("IntCodec", "block_size", block_size, f"{self._format.valid_block}, for example 128")
        self._row_bytes = scaled_blocks.row_bytes(self._format.bytes, torch.bfloat16)
        self._largest = self._format.largest_code * self._format.largest_multiple  # element, in units
        self._largest_unit = _bf16_below(_LARGEST / self._largest)  # keeps decoded elements finite

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
        format_ = self._format
        blocks, rows = values.view(-1, self.block), encoded.view(-1, self._row_bytes)
        codes = blocks.abs()
        peaks = format_.peaks(codes)
        units = peaks.amax(dim=1, keepdim=True).float().mul_(_ROUNDED_UP / self._largest)
        units = units.clamp_(_SMALLEST_UNIT, self._largest_unit).to(torch.bfloat16).to(values.dtype)
        multiples = peaks.div_(units * format_.largest_code).ceil_().clamp_(1, format_.largest_multiple)
        scales = _of_each_element(units * multiples, format_.group)
        torch.div(blocks, scales, out=codes).round_()
        if values.dtype == torch.float64:
            codes.clamp_(-format_.largest_code, format_.largest_code)  # beyond the range of fp32
        blocks.addcmul_(codes, scales, value=-1)
        scaled_blocks.write(format_.pack(codes, multiples), units, rows, torch.bfloat16)

    @override
    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        blocks = encoded.numel() // self._row_bytes
        values = encoded.new_zeros(blocks, self.block, dtype=dtype).view(len(encoded), -1)
        self.add_decoded_(encoded, values)
        return values

    @override
    def add_decoded_(self, encoded: Tensor, values: Tensor) -> None:
        codes, units = scaled_blocks.read(encoded.view(-1, self._row_bytes), torch.bfloat16)
        self._format.add_decoded_(codes, units.to(values.dtype), values.view(-1, self.block))


class _Int8:
    """A byte per code; one scale per block."""

    largest_code, largest_multiple = 127, 1
    divisor, valid_block = 2, "an even number"

    def __init__(self, block: int) -> None:
        self.group = self.bytes = block

    def peaks(self, magnitudes: Tensor) -> Tensor:
        """The largest magnitude in each group; shape (blocks, groups)."""
        return magnitudes.amax(dim=1, keepdim=True)

    def pack(self, codes: Tensor, multiples: Tensor) -> list[Tensor]:
        """The bytes of each block, in parts."""
        return [codes]

    def add_decoded_(self, packed: Tensor, units: Tensor, blocks: Tensor) -> None:
        """Decode packed bytes, and add the elements to ``blocks``."""
        blocks.addcmul_(packed.to(blocks.dtype), units)


class _Int4:
    """Two codes per byte; one scale per 16 elements, as a multiple of the block's unit."""

    largest_code, largest_multiple = 7, 2 * _MIDDLE - 1
    divisor, valid_block = 2 * _GROUP, f"a multiple of {2 * _GROUP} with 4 bits"

    def __init__(self, block: int) -> None:
        self.group = _GROUP
        self._code_bytes = block // 2
        self.bytes = self._code_bytes + block // (2 * _GROUP)

    def peaks(self, magnitudes: Tensor) -> Tensor:
        return nn.functional.max_pool1d(magnitudes, self.group)  # faster than amax() for short rows

    def pack(self, codes: Tensor, multiples: Tensor) -> list[Tensor]:
        return [_in_pairs(codes), _in_pairs(multiples.sub_(_MIDDLE))]

    def add_decoded_(self, packed: Tensor, units: Tensor, blocks: Tensor) -> None:
        codes, pairs = (part.to(blocks.dtype) for part in packed.tensor_split([self._code_bytes], dim=1))
        multiples = torch.cat(_out_of_pairs(pairs), dim=1).add_(_MIDDLE)
        scales = _of_each_element(multiples.mul_(units), self.group)
        halves = blocks.chunk(2, dim=1), _out_of_pairs(codes), scales.chunk(2, dim=1)
        for half, each, scale in zip(*halves, strict=True):
            half.addcmul_(each, scale)


def _of_each_element(scales: Tensor, group: int) -> Tensor:
    """The scale of each element, from one per group."""
    return scales[:, :, None].expand(-1, -1, group).flatten(1)


def _in_pairs(numbers: Tensor) -> Tensor:
    """Combine each number in the first half of a row with one in the second, in the first half's storage."""
    half = numbers.shape[1] // 2
    return numbers[:, :half].add_(numbers[:, half:], alpha=16)


def _out_of_pairs(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves that :func:`_in_pairs` has combined; the first in the storage of ``pairs``."""
    second = torch.mul(pairs, 1 / 16).round_()  # the first is less than 8, so rounding removes it
    return pairs.sub_(second, alpha=16), second


def _bf16_below(value: float) -> float:
    """The largest bf16 number that is not larger than a positive fp32 number."""
    return (torch.tensor(value).view(torch.int32) >> 16 << 16).view(torch.float32).item()
