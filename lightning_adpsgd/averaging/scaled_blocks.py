"""Blocks of numbers that share a scale, as rows of bytes: the codes of the elements, then the scale."""

from collections.abc import Sequence

import torch
from torch import Tensor


def blocks_in(numel: int, size: int) -> int:
    """How many blocks hold ``numel`` elements. The last one may not be full, but takes as many bytes as the others."""
    return -(-numel // size)


def padded(values: Tensor, size: int) -> Tensor:
    """Flat ``values``, padded with zeros to whole blocks of ``size`` elements; ``values`` itself if they are whole."""
    missing = blocks_in(len(values), size) * size - len(values)
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


def row_bytes(codes: int, scale: torch.dtype) -> int:
    """Bytes of a block with ``codes`` one-byte codes."""
    return codes + scale.itemsize


def write(codes: Sequence[Tensor], scales: Tensor, rows: Tensor, scale: torch.dtype) -> None:
    """Write blocks as rows of bytes.

    Args:
        codes: integers from −128 to 127, of any dtype, in parts that are written side by side; each of shape
            (blocks, codes per block).
        scales: shape (blocks, 1).
        rows: uint8, contiguous, shape (blocks, :func:`row_bytes`).
        scale: the dtype in which to write the scales.
    """
    start = 0
    for part in codes:
        rows.view(torch.int8)[:, start : start + part.shape[1]].copy_(part)
        start += part.shape[1]
    if _is_aligned(rows, scale):
        rows.view(scale)[:, -1:].copy_(scales)
    else:
        rows[:, -scale.itemsize :] = scales.to(scale).view(torch.uint8)


def read(rows: Tensor, scale: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes, as int8, and the scales that :func:`write` has written."""
    if _is_aligned(rows, scale):
        scales = rows.view(scale)[:, -1:]
    else:
        scales = rows[:, -scale.itemsize :].clone(memory_format=torch.contiguous_format).view(scale)
    return rows.view(torch.int8)[:, : rows.shape[1] - scale.itemsize], scales


def _is_aligned(rows: Tensor, scale: torch.dtype) -> bool:
    """Whether every row's scale begins at a multiple of its size, as a view of that dtype requires."""
    return rows.shape[1] % scale.itemsize == 0 and int(rows.storage_offset()) % scale.itemsize == 0
