"""Tensors laid end to end: one index space per dtype and device, any range of which can be packed and unpacked."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

_FEW = 32  # tensors for which it is quicker to go through them one by one, in one pass, than all together in two


class Range(NamedTuple):
    """Elements ``start`` to ``stop`` (exclusive) of one index space of a :class:`FlatLayout`."""

    space: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def chunks(self, length: int) -> "Iterator[Range]":
        """This range in pieces of at most ``length`` elements, in order."""
        for start in range(self.start, self.stop, length):
            yield Range(self.space, start, min(start + length, self.stop))


def hash48(data: bytes) -> int:
    """A hash of 48 bits, which a float64 holds exactly, so that workers can compare it in a table."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big")


def has_mean(tensor: Tensor) -> bool:
    """Whether its elements are real or complex numbers, of which a mean is one too; integers and bools have none."""
    return tensor.is_floating_point() or tensor.is_complex()


def extremes(values: Tensor) -> Tensor:
    """The smallest and the largest of real values: both are finite exactly if all are, for NaN is passed on by both."""
    return torch.stack(torch.aminmax(values))


class FlatLayout:
    """An index space over many tensors, so that averaging can be cut anywhere, whatever the tensors' sizes.

    Tensors that share storage are laid out once, empty ones not at all. Each index space holds tensors of one dtype on
    one device; complex tensors appear as pairs of reals. Packing widens 16-bit elements to fp32. A dense tensor is laid
    out in the order of its memory, whatever its memory format; any other in the order of its indices.

    Args:
        tensors: what to lay out, in the order in which it is laid out.
        groups: for each tensor, the index of its parameter group, or None if it belongs to no group. Tensors of a group
            are best given one after the other.
    """

    def __init__(self, tensors: Sequence[Tensor], groups: Sequence[int | None]) -> None:
        self._indices: list[int] = []
        self._signature: list[tuple[object, ...]] = []
        seen: set[tuple[object, ...]] = set()
        spaces: dict[tuple[torch.dtype, torch.device], list[_Entry]] = {}
        for index, (tensor, group) in enumerate(zip(tensors, groups, strict=True)):
            if tensor.numel() == 0:
                continue
            entry = _Entry.of(tensor, group)
            if entry.storage in seen:
                continue
            seen.add(entry.storage)
            spaces.setdefault((tensor.dtype, tensor.device), []).append(entry)
            self._indices.append(index)
            self._signature.append((str(tensor.dtype), tuple(tensor.shape), group, entry.order))
        self._spaces = [_Space(entries) for entries in spaces.values()]

    @property
    def signature(self) -> list[tuple[object, ...]]:
        """What all workers have to agree on, tensor by tensor: dtype, shape, group, order of the elements in memory."""
        return self._signature

    @property
    def indices(self) -> list[int]:
        """The places in ``tensors`` of those that were laid out, one per entry of the signature."""
        return self._indices

    @property
    def fingerprint(self) -> int:
        """A 48-bit hash of the signature; exact as a float64."""
        return hash48(repr(self._signature).encode())

    @property
    def numel(self) -> int:
        """Number of elements in all index spaces; a complex element counts twice."""
        return sum(space.length for space in self._spaces)

    def cut(self, max_bytes: int, part: int = 0, parts: int = 1) -> list[Range]:
        """The layout, or one part of it, as ranges of nearly equal length, each at most ``max_bytes`` when packed.

        Args:
            max_bytes: the longest range, in bytes.
            part: which part, from 0.
            parts: into how many the layout is divided; of each index space they have the same length, give or take one
                element, whatever the tensors.
        """
        ranges: list[Range] = []
        for index, space in enumerate(self._spaces):
            slice_ = Range(index, space.length * part // parts, space.length * (part + 1) // parts)
            if len(slice_) > 0:
                longest = max(1, max_bytes // space.packed_dtype.itemsize)
                pieces = -(-len(slice_) // longest)
                ranges += slice_.chunks(-(-len(slice_) // pieces))
        return ranges

    def cut_into_spaces(self) -> list[Range]:
        """Each index space as one range."""
        return [Range(index, 0, space.length) for index, space in enumerate(self._spaces)]

    def new_buffer(self, range_: Range, device: torch.device | str = "cpu") -> Tensor:
        """An uninitialized buffer that a range can be packed into: fp64 for 64-bit elements, otherwise fp32.

        Args:
            range_: the range.
            device: where to make it for tensors on the CPU; for others it is made on their own device.
        """
        space = self._spaces[range_.space]
        return torch.empty(len(range_), dtype=space.packed_dtype, device=space.buffers_on(device))

    def fits(self, range_: Range, buffer: Tensor, device: torch.device | str = "cpu") -> bool:
        """Whether ``buffer`` can take the place of a :meth:`new_buffer` for the range."""
        space = self._spaces[range_.space]
        here = buffer.device == space.buffers_on(device)
        return buffer.dtype == space.packed_dtype and here and len(buffer) >= len(range_)

    def pack(self, range_: Range, out: Tensor, divisor: int = 1) -> Tensor:
        """Copy a range of the tensors, divided by ``divisor``, into ``out`` (shape: (len(range_),)), and return it."""
        targets, sources = self._pieces(range_, out)
        if divisor != 1 and len(sources) <= _FEW and sources[0].dtype == out.dtype:
            for target, source in zip(targets, sources, strict=True):
                torch.div(source, divisor, out=target)  # memory is passed over once
            return out
        torch._foreach_copy_(targets, sources)
        return out if divisor == 1 else out.div_(divisor)

    def difference(self, range_: Range, values: Tensor, out: Tensor) -> Tensor:
        """Put a range of the tensors, less ``values``, into ``out`` (both of shape (len(range_),)), and return it."""
        targets, sources = self._pieces(range_, out)
        if len(sources) <= _FEW and sources[0].dtype == out.dtype:
            offset = 0
            for target, source in zip(targets, sources, strict=True):
                torch.sub(source, values[offset : offset + len(target)], out=target)
                offset += len(target)
            return out
        torch._foreach_copy_(targets, sources)
        return out.sub_(values)

    def _pieces(self, range_: Range, buffer: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The parts of a buffer for a range, and those of the tensors."""
        pieces = self._spaces[range_.space].pieces(range_)
        targets = [*buffer.split([stop - start for _, start, stop in pieces])]
        return targets, [entry.read(start, stop) for entry, start, stop in pieces]

    def unpack(self, range_: Range, buffer: Tensor) -> None:
        """Write ``buffer`` (shape: (len(range_),)) into a range of the tensors, in place."""
        pieces = self._spaces[range_.space].pieces(range_)
        sources = buffer.split([stop - start for _, start, stop in pieces])
        whole = [entry.flat is not None for entry, _, _ in pieces]
        targets = [entry.read(start, stop) for (entry, start, stop), dense in zip(pieces, whole, strict=True) if dense]
        if targets:
            torch._foreach_copy_(targets, [source for source, dense in zip(sources, whole, strict=True) if dense])
        for (entry, start, stop), source, dense in zip(pieces, sources, whole, strict=True):
            if not dense:
                entry.write(start, stop, source)

    def move(self, range_: Range, mean: Tensor, difference: Tensor) -> None:
        """Add ``difference`` to a range of what belongs to a parameter group; overwrite the rest of it with ``mean``.

        Args:
            range_: the range.
            mean: shape (len(range_),).
            difference: shape (len(range_),).
        """
        pieces = self._spaces[range_.space].pieces(range_)
        lengths = [stop - start for _, start, stop in pieces]
        targets, added = [], []
        for (entry, start, stop), new, change in zip(
            pieces, mean.split(lengths), difference.split(lengths), strict=True
        ):
            if entry.flat is None:
                entry.write(start, stop, new if entry.group is None else entry.read(start, stop) + change)
            elif entry.group is None:
                entry.read(start, stop).copy_(new)
            else:
                targets.append(entry.read(start, stop))
                added.append(change)
        if targets:
            torch._foreach_add_(targets, added)

    def groups(self, range_: Range) -> list[tuple[int, int, int]]:
        """The runs of a range that belong to one parameter group: (group, start, stop), relative to the range."""
        runs: list[tuple[int, int, int]] = []
        position = 0
        for entry, start, stop in self._spaces[range_.space].pieces(range_):
            end = position + stop - start
            if entry.group is not None:
                if runs and runs[-1][0] == entry.group and runs[-1][2] == position:
                    runs[-1] = (entry.group, runs[-1][1], end)
                else:
                    runs.append((entry.group, position, end))
            position = end
        return runs


class _Entry(NamedTuple):
    """One tensor of an index space."""

    tensor: Tensor  # real, and without its autograd history
    group: int | None
    flat: Tensor | None  # all its elements as one dimension in the same storage; None if there is no such view
    order: tuple[int, ...] | None  # its dimensions from outermost to innermost in memory; None: in order of the indices

    @classmethod
    def of(cls, tensor: Tensor, group: int | None) -> "_Entry":
        # .data, not .detach(): averaging must not count as an in-place change for autograd. A graph that has saved a
        # BatchNorm buffer would otherwise refuse its backward pass after a round of another optimizer.
        real = torch.view_as_real(tensor.data) if tensor.is_complex() else tensor.data
        # An expanded dimension repeats one element: that one is laid out.
        real = real[tuple(0 if stride == 0 else slice(None) for stride in real.stride())]
        strides = real.stride()
        order = tuple(sorted(range(real.dim()), key=lambda dim: (real.shape[dim] > 1, -strides[dim])))
        dense = real.permute(order)
        if dense.is_contiguous():
            order = tuple(dim for dim in order if real.shape[dim] > 1)
            return cls(real, group, dense.view(-1), order)
        return cls(real, group, None, None)

    @property
    def storage(self) -> tuple[object, ...]:
        """What two tensors have in common exactly if they are the same elements in memory."""
        if self.flat is not None:
            return (self.flat.data_ptr(), self.flat.dtype, self.flat.numel())
        return (self.tensor.data_ptr(), self.tensor.dtype, tuple(self.tensor.shape), self.tensor.stride())

    def read(self, start: int, stop: int) -> Tensor:
        """Elements start to stop; a view into the tensor's storage if it has a flat one."""
        flat = self.flat if self.flat is not None else self.tensor.reshape(-1)
        return flat if stop - start == flat.numel() else flat[start:stop]

    def write(self, start: int, stop: int, source: Tensor) -> None:
        """Overwrite elements start to stop of a tensor that has no flat view."""
        elements = self.tensor.reshape(-1).clone()
        elements[start:stop] = source
        self.tensor.copy_(elements.view(self.tensor.shape))


class _Space:
    """The tensors of one dtype and device, one after the other."""

    def __init__(self, entries: list[_Entry]) -> None:
        self.entries = entries
        self.ends = list(accumulate(entry.tensor.numel() for entry in entries))
        self.length = self.ends[-1]
        self.device = entries[0].tensor.device
        self.packed_dtype = torch.float64 if entries[0].tensor.dtype == torch.float64 else torch.float32

    def buffers_on(self, device: torch.device | str) -> torch.device:
        """Where to pack: CPU tensors on the workers' device, for NCCL cannot reduce on the CPU; others on their own."""
        return torch.device(device) if self.device.type == "cpu" else self.device

    def pieces(self, range_: Range) -> list[tuple[_Entry, int, int]]:
        """The parts of tensors that a range covers: (entry, start, stop) within the tensor, in order."""
        pieces = []
        position = range_.start
        index = bisect_right(self.ends, position)
        while position < range_.stop:
            entry, end = self.entries[index], self.ends[index]
            begin = end - entry.tensor.numel()
            stop = min(end, range_.stop)
            pieces.append((entry, position - begin, stop - begin))
            position = stop
            index += 1
        return pieces
