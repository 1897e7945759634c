"""Rounds in 8 or 4 bits per element: signed integers, and a scale per block of elements."""

from numbers import Integral

import torch
from torch import Tensor
from typing_extensions import override

from lightning_adpsgd.averaging import scaled_blocks
from lightning_adpsgd.averaging.codec import Codec
from lightning_adpsgd.validation import check_instance, check_int, wrong_value

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # whose reciprocal is finite, too
_LARGEST = torch.finfo(torch.float32).max
# Rounding to bf16 takes away one part in 257 at most. What is larger by one in 256 is rounded up, in effect.
_ROUNDED_UP = 257 / 256


class IntCodec(Codec):
    """Signed integers of 8 or 4 bits, from −m to m with m = 127 or 7, and one scale s per block of elements.

    An element x of a block becomes the code round(x / s), which stands for code · s, where s is the block's largest
    absolute value divided by m: each element is off by at most s / 2. A block of zeros stays one, so what does not
    change on any worker does not change at all.

    A scale takes 2 bytes: it is a bf16 number, rounded up so that nothing is clipped. (In fp16, whose smallest number
    is 6e-8, what changes between two rounds late in a training would vanish; bf16 has the range of fp32.) A code times
    a scale is exact in fp32. Elements beyond the range of fp32 travel in several rounds.

    In a message every block is a row of bytes, the codes and then the scale. With 4 bits, a byte holds the codes of
    two elements, one of each half of the block: first + 16 · second.

    Args:
        bits: per element, 8 or 4.
        block_size: elements that share a scale, an even number. Smaller blocks err less and take more bytes: 2 / this
            per element, beside ``bits`` / 8.

    Raises:
        TypeError: if an argument is not an int.
        ValueError: if ``bits`` is neither 8 nor 4, or ``block_size`` is not positive and even.
    """

    def __init__(self, bits: int = 4, block_size: int = 128) -> None:
        self.bits = int(check_instance("IntCodec", "bits", bits, Integral, "8 or 4"))
        if self.bits not in (8, 4):
            raise wrong_value("IntCodec", "bits", bits, "8 or 4")
        self.block = check_int("IntCodec", "block_size", block_size, at_least=2, at_most=2**20)
        if self.block % 2:
            raise wrong_value("IntCodec", "block_size", block_size, "an even number, for example 128")
        self._half = self.block // 2
        self._row_bytes = scaled_blocks.row_bytes(self.block * self.bits // 8, torch.bfloat16)
        self._largest_code = 2 ** (self.bits - 1) - 1
        self._scale_per_peak = _ROUNDED_UP / self._largest_code
        # The largest code times the largest scale is finite.
        self._largest_scale = _bf16_below(_LARGEST / self._largest_code)

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
        blocks = values.view(-1, self.block)
        codes = blocks.abs()
        exact = codes.amax(dim=1, keepdim=True).float().mul_(self._scale_per_peak)
        scales = exact.clamp_(_SMALLEST_SCALE, self._largest_scale).to(torch.bfloat16).to(values.dtype)
        torch.mul(blocks, scales.reciprocal(), out=codes).round_()
        if values.dtype == torch.float64:
            codes.clamp_(-self._largest_code, self._largest_code)  # what fp32 cannot hold
        blocks.addcmul_(codes, scales, value=-1)
        if self.bits == 4:
            codes = codes[:, : self._half].add_(codes[:, self._half :], alpha=16)
        scaled_blocks.write(codes, scales, encoded.view(-1, self._row_bytes), torch.bfloat16)

    @override
    def decode(self, encoded: Tensor, dtype: torch.dtype) -> Tensor:
        blocks = encoded.numel() // self._row_bytes
        values = encoded.new_zeros(blocks, self.block, dtype=dtype).view(len(encoded), -1)
        self.add_decoded_(encoded, values)
        return values

    @override
    def add_decoded_(self, encoded: Tensor, values: Tensor) -> None:
        bytes_, scales = scaled_blocks.read(encoded.view(-1, self._row_bytes), torch.bfloat16)
        blocks, codes, scales = values.view(-1, self.block), bytes_.to(values.dtype), scales.to(values.dtype)
        if self.bits == 8:
            blocks.addcmul_(codes, scales)
            return
        second = torch.mul(codes, 1 / 16).round_()  # which takes away the first code, as that is less than 8
        blocks[:, : self._half].addcmul_(codes.sub_(second, alpha=16), scales)
        blocks[:, self._half :].addcmul_(second, scales)


def _bf16_below(value: float) -> float:
    """The largest bf16 number that is not larger than a positive fp32 number."""
    return (torch.tensor(value).view(torch.int32) >> 16 << 16).view(torch.float32).item()
