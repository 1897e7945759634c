"""Index spaces over tensors laid end to end, and tiles: ranges that are short enough to stay in a cache."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

# Elements: on a CPU few enough for its cache, elsewhere enough for one kernel launch.
_AT_ONCE = {"cpu": 1 << 16}
_AT_ONCE_ELSEWHERE = 1 << 22

Order = tuple[int, ...] | None
"""A tensor's dimensions of more than one element, outermost first; None: the order of its indices."""


def at_once(device: torch.device) -> int:
    """How many elements to copy, compare or measure at once."""
    return _AT_ONCE.get(device.type, _AT_ONCE_ELSEWHERE)


class Entry(NamedTuple):
    """One tensor of an index space."""

    tensor: Tensor
    """A real view without autograd history, permuted so that its index order is the order of the layout."""
    group: int | None
    flat: Tensor | None
    """All its elements as a one-dimensional view of the same storage; None if there is no such view."""
    order: Order
    place: int = 0
    """Its index among the tensors of the layout."""

    @classmethod
    def of(cls, tensor: Tensor, group: int | None) -> "Entry":
        """Lay a tensor out in the order of its memory if it is dense, otherwise in the order of its indices."""
        # An expanded dimension repeats one element, which is laid out once.
        real = _real(tensor)
        real = real[tuple(0 if stride == 0 else slice(None) for stride in real.stride())]
        strides = real.stride()
        permutation = sorted(range(real.dim()), key=lambda dim: (real.shape[dim] > 1, -strides[dim]))
        dense = real.permute(permutation)
        if dense.is_contiguous():
            return cls(dense, group, dense.view(-1), tuple(dim for dim in permutation if real.shape[dim] > 1))
        return cls(real, group, None, None)

    @classmethod
    def in_order(cls, tensor: Tensor, group: int | None, order: Order) -> "Entry":
        """Lay a tensor out in a given order; there is no flat view if its order in memory differs."""
        entry, real = cls.of(tensor, group), _real(tensor)
        # An expanded tensor has fewer elements in memory, so the given order does not apply.
        if entry.order == order or 0 in real.stride():
            return entry
        if order is not None:
            real = real.permute([*(dim for dim in range(real.dim()) if dim not in order), *order])
        return cls(real, group, real.view(-1) if real.is_contiguous() else None, order)

    def can_replace(self, other: "Entry") -> bool:
        """Whether it has the other's shape, dtype and device."""
        mine, theirs = self.tensor, other.tensor
        return (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)

    @property
    def storage(self) -> tuple[object, ...]:
        """A key that two tensors share if and only if they are the same elements in memory."""
        if self.flat is not None:
            return (self.flat.data_ptr(), self.flat.dtype, self.flat.numel())
        return (self.tensor.data_ptr(), self.tensor.dtype, tuple(self.tensor.shape), self.tensor.stride())

    def read(self, start: int, stop: int) -> Tensor:
        """Elements start to stop; a view of the tensor's storage if there is a flat one."""
        flat = self.flat if self.flat is not None else self.tensor.reshape(-1)
        return flat if stop - start == flat.numel() else flat[start:stop]

    def write(self, start: int, stop: int, source: Tensor) -> None:
        """Overwrite elements start to stop of a tensor that has no flat view."""
        elements = self.tensor.reshape(-1).clone()
        elements[start:stop] = source
        self.tensor.copy_(elements.view(self.tensor.shape))


def entries_of(
    tensors: Sequence[Tensor], groups: Sequence[int | None], orders: Mapping[int, Order]
) -> Iterator[tuple[int, Entry]]:
    """For each non-empty tensor, once per storage: its index in ``tensors``, and its entry."""
    seen: set[tuple[object, ...]] = set()
    for index, (tensor, group) in enumerate(zip(tensors, groups, strict=True)):
        if tensor.numel() == 0:
            continue
        known = index in orders
        entry = Entry.in_order(tensor, group, orders[index]) if known else Entry.of(tensor, group)
        if entry.storage not in seen:
            seen.add(entry.storage)
            yield index, entry._replace(place=index)


Piece = tuple[Entry, int, int]
"""A range of a tensor's elements: entry, start, stop (exclusive)."""


class Space:
    """An index space: the tensors of one dtype and device, one after the other."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self.ends = list(accumulate(entry.tensor.numel() for entry in entries))
        self.length = self.ends[-1]
        self.device = entries[0].tensor.device
        self.packed_dtype = torch.float64 if entries[0].tensor.dtype == torch.float64 else torch.float32

    def buffers_on(self, device: torch.device | str) -> torch.device:
        """The device to pack on: the workers' for CPU tensors, which NCCL cannot reduce; otherwise the tensors' own."""
        return torch.device(device) if self.device.type == "cpu" else self.device

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The pieces of tensors that make up elements start to stop, in order."""
        pieces = []
        index = bisect_right(self.ends, start)
        while start < stop:
            entry, end = self.entries[index], self.ends[index]
            begin = end - entry.tensor.numel()
            pieces.append((entry, start - begin, min(end, stop) - begin))
            start, index = end, index + 1
        return pieces

    def tiles(self, start: int, stop: int) -> "list[Tile]":
        """Cut elements start to stop into tiles, in order."""
        position, tiles = 0, []
        for pieces in _lots(self.pieces(start, stop), at_once(self.device)):
            tiles.append(Tile(position, pieces))
            position = tiles[-1].stop
        return tiles


class Tile:
    """A range of a bucket, short enough to stay in a cache from one operation to the next.

    Args:
        start: its first element, relative to the bucket.
        pieces: the pieces of tensors that it covers, in order.
    """

    def __init__(self, start: int, pieces: list[Piece]) -> None:
        self._pieces = pieces
        self._lengths = [stop - start for _, start, stop in pieces]
        self._dense = all(entry.flat is not None for entry, _, _ in pieces)
        self._views = [entry.read(start, stop) for entry, start, stop in pieces] if self._dense else []
        # What was made in inference mode can only be overwritten in it.
        self._writing = torch.inference_mode if any(e.tensor.is_inference() for e, _, _ in pieces) else nullcontext
        self.start = start
        self.stop = start + sum(self._lengths)
        self.runs = runs(pieces)
        """The tile's runs of elements of one parameter group: (group, start, stop), relative to the tile."""

    def __len__(self) -> int:
        return self.stop - self.start

    def pack(self, out: Tensor) -> Tensor:
        """Copy the elements into ``out`` (shape (len(self),)); return ``out``."""
        sources = self._values()
        if len(sources) == 1:
            out.copy_(sources[0])
        elif _alike(sources[0], out):
            torch.cat(sources, out=out)
        else:
            torch._foreach_copy_([*out.split(self._lengths)], sources)
        return out

    def difference(self, values: Tensor, out: Tensor) -> Tensor:
        """Write the elements minus ``values`` into ``out`` (both of shape (len(self),)); return ``out``."""
        sources = self._values()
        if len(sources) == 1 and _alike(sources[0], out):
            return torch.sub(sources[0], values, out=out)
        return self.pack(out).sub_(values)

    def unpack(self, values: Tensor) -> None:
        """Overwrite the elements with ``values`` (shape (len(self),)), in place."""
        with self._writing():
            if not self._dense:
                for (entry, start, stop), source in zip(self._pieces, values.split(self._lengths), strict=True):
                    entry.write(start, stop, source)
            elif len(self._views) == 1:
                self._views[0].copy_(values)
            else:
                torch._foreach_copy_(self._views, [*values.split(self._lengths)])

    def move(self, mean: Tensor, difference: Tensor) -> None:
        """Subtract ``difference`` from elements of parameter groups; set others to ``mean`` where it is not 0.

        Both have shape (len(self),).
        """
        targets, subtracted = [], []
        means, changes = mean.split(self._lengths), difference.split(self._lengths)
        for (entry, start, stop), new, change in zip(self._pieces, means, changes, strict=True):
            here = entry.read(start, stop)
            if entry.group is None:
                new = torch.where(change == 0, here, new)  # equal on all workers when sent: keep later changes
            elif entry.flat is None:
                new = here - change
            else:
                targets.append(here)
                subtracted.append(change)
                continue
            if entry.flat is None:
                entry.write(start, stop, new)
            else:
                here.copy_(new)
        if targets:
            torch._foreach_sub_(targets, subtracted)

    def of_groups(self, values: Tensor) -> Iterator[tuple[Entry, int, int, Tensor]]:
        """Each piece of a parameter group: its entry, its range there (start, stop), and its part of ``values``."""
        for (entry, start, stop), part in zip(self._pieces, values.split(self._lengths), strict=True):
            if entry.group is not None:
                yield entry, start, stop, part

    def _values(self) -> list[Tensor]:
        return self._views if self._dense else [entry.read(start, stop) for entry, start, stop in self._pieces]


def runs(pieces: list[Piece]) -> list[tuple[int, int, int]]:
    """The runs of elements of one parameter group: (group, start, stop), relative to the first piece."""
    found: list[tuple[int, int, int]] = []
    position = 0
    for entry, start, stop in pieces:
        end = position + stop - start
        if entry.group is not None:
            if found and found[-1][0] == entry.group and found[-1][2] == position:
                found[-1] = (entry.group, found[-1][1], end)
            else:
                found.append((entry.group, position, end))
        position = end
    return found


def _lots(pieces: list[Piece], longest: int) -> Iterator[list[Piece]]:
    """Cut pieces into lots of at most ``longest`` elements; a piece without a flat view is a separate lot."""
    lot: list[Piece] = []
    room = longest
    for entry, start, stop in pieces:
        if entry.flat is None:  # reading any part of it may copy all of it
            if lot:
                yield lot
            yield [(entry, start, stop)]
            lot, room = [], longest
            continue
        while start < stop:
            end = min(stop, start + room)
            lot.append((entry, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield lot
                lot, room = [], longest
    if lot:
        yield lot


def _real(tensor: Tensor) -> Tensor:
    # .data, not .detach(): averaging must not count as an in-place change for autograd. A graph that has saved a
    # BatchNorm buffer would otherwise refuse its backward pass after a round of another optimizer.
    return torch.view_as_real(tensor.data) if tensor.is_complex() else tensor.data


def _alike(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype == other.dtype and tensor.device == other.device
