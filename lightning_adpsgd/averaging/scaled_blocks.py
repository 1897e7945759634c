"""Blocks of numbers that share a scale, as rows of bytes: the codes of the elements, and then the scale."""

import torch
from torch import Tensor


def blocks_in(numel: int, size: int) -> int:
    """How many blocks hold so many elements; the last one may not be full, and takes as many bytes as the others."""
    return -(-numel // size)


def padded(values: Tensor, size: int) -> Tensor:
    """Flat ``values`` up to the end of their last block of ``size`` elements, which is filled with zeros.

    Returns:
        Shape (blocks · size,); ``values`` itself where the last block is full.
    """
    missing = blocks_in(len(values), size) * size - len(values)
    return torch.nn.functional.pad(values, (0, missing)) if missing else values


def row_bytes(codes: int, scale: torch.dtype) -> int:
    """Bytes of a block with so many codes of one byte each."""
    return codes + scale.itemsize


def write(codes: Tensor, scales: Tensor, rows: Tensor, scale: torch.dtype) -> None:
    """Write blocks as rows of bytes.

    Args:
        codes: whole numbers from −128 to 127, of any type; shape (blocks, codes per block). A row may have room for
            further codes before its scale, which are left alone.
        scales: shape (blocks, 1).
        rows: uint8, contiguous, shape (blocks, :func:`row_bytes`).
        scale: the type that scales have in a row.
    """
    count = codes.shape[1]
    rows.view(torch.int8)[:, :count].copy_(codes)
    if _is_aligned(rows, scale):
        rows.view(scale)[:, -1:].copy_(scales)
    else:
        rows[:, -scale.itemsize :] = scales.to(scale).view(torch.uint8)


def read(rows: Tensor, scale: torch.dtype) -> tuple[Tensor, Tensor]:
    """The codes, as int8, and the scales that :func:`write` has written."""
    if _is_aligned(rows, scale):
        scales = rows.view(scale)[:, -1:]
    else:  # a number has to begin at a multiple of its size
        scales = rows[:, -scale.itemsize :].clone(memory_format=torch.contiguous_format).view(scale)
    return rows.view(torch.int8)[:, : rows.shape[1] - scale.itemsize], scales


def _is_aligned(rows: Tensor, scale: torch.dtype) -> bool:
    return rows.shape[1] % scale.itemsize == 0 and int(rows.storage_offset()) % scale.itemsize == 0
