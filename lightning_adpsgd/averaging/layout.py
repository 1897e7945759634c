"""Tensors laid end to end: one index space per dtype and device, any range of which can be packed and unpacked."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor

# Elements that are copied or measured at once: on a CPU few enough for its cache, elsewhere enough for a kernel.
_AT_ONCE = {"cpu": 1 << 16}
_AT_ONCE_ELSEWHERE = 1 << 22

_REMEMBERED = 256  # ranges whose tiles are kept: up to 4 GiB of parameters on a CPU


Described = tuple[object, ...]
"""A tensor as all workers have to have it: name, dtype, shape, parameter group, order in memory."""

Order = tuple[int, ...] | None
"""A tensor's dimensions of more than one element, from outermost to innermost; None: in the order of its indices."""


class Bucket(NamedTuple):
    """Elements ``start`` to ``stop`` (exclusive) of one index space of a :class:`FlatLayout`."""

    space: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def split(self, length: int) -> "Iterator[Bucket]":
        """This range in pieces of at most ``length`` elements, in order."""
        for start in range(self.start, self.stop, length):
            yield Bucket(self.space, start, min(start + length, self.stop))

    def overlaps(self, other: "Bucket") -> bool:
        """Whether they have elements in common."""
        return self.space == other.space and self.start < other.stop and other.start < self.stop

    def without(self, other: "Bucket") -> "list[Bucket]":
        """What is left of this range, in order, where another one is taken out of it."""
        if not self.overlaps(other):
            return [self]
        left = Bucket(self.space, self.start, max(self.start, other.start))
        right = Bucket(self.space, min(self.stop, other.stop), self.stop)
        return [rest for rest in (left, right) if len(rest) > 0]


def hash48(data: bytes) -> int:
    """A hash of 48 bits, which a float64 holds exactly, so that workers can compare it in a table."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big")


def has_mean(tensor: Tensor) -> bool:
    """Whether its elements are real or complex numbers, of which a mean is one too; integers and bools have none."""
    return tensor.is_floating_point() or tensor.is_complex()


def extremes(values: Tensor) -> Tensor:
    """The smallest and the largest of real values: both are finite exactly if all are, for NaN is passed on by both."""
    return torch.stack(torch.aminmax(values))


def finite(found: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """Whether all :func:`extremes` that were found are finite, as a bool tensor of one element on a device."""
    if not found:
        return torch.tensor(True, device=device)
    return torch.isfinite(torch.stack([each.to(device, torch.float64) for each in found])).all()


class FlatLayout:
    """An index space over many tensors, so that averaging can be cut anywhere, whatever the tensors' sizes.

    Tensors that share storage are laid out once, empty ones not at all. Each index space holds tensors of one dtype on
    one device; complex tensors appear as pairs of reals. Packing widens 16-bit elements to fp32. A dense tensor is laid
    out in the order of its memory, whatever its memory format; any other in the order of its indices.

    Args:
        tensors: what to lay out, in the order in which it is laid out.
        groups: for each tensor, the index of its parameter group, or None if it belongs to no group. Tensors of a group
            are best given one after the other.
        orders: for some tensors, by their place in ``tensors``: in which order to lay out their elements (see
            :attr:`orders`), whatever the order in memory.
        apart: whether tensors of no group get index spaces of their own.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        groups: Sequence[int | None],
        orders: "Mapping[int, Order] | None" = None,
        apart: bool = False,
    ) -> None:
        self._indices: list[int] = []
        self._signature: list[tuple[object, ...]] = []
        spaces: dict[tuple[object, ...], list[_Entry]] = {}
        places: list[tuple[tuple[object, ...], int]] = []
        for index, entry in _without_repetition(tensors, groups, orders or {}):
            key = (tensors[index].dtype, entry.tensor.device, apart and entry.group is None)
            entries = spaces.setdefault(key, [])
            places.append((key, len(entries)))
            entries.append(entry)
            self._indices.append(index)
            tensor = tensors[index]
            self._signature.append((str(tensor.dtype), tuple(tensor.shape), entry.group, entry.order))
        self._spaces = [_Space(entries) for entries in spaces.values()]
        numbers = {key: number for number, key in enumerate(spaces)}
        self._places = [(numbers[key], place) for key, place in places]
        self._groups = [*groups]
        self._fingerprint = hash48(repr(self._signature).encode())
        self._tiles: dict[Bucket, list[Tile]] = {}

    def rebind(self, tensors: Sequence[Tensor]) -> bool:
        """Find the elements in ``tensors`` from now on: the same tensors as before, perhaps in storage of their own.

        Code that re-assigns a buffer or re-points ``p.data`` leaves the old storage to nobody. Every element keeps its
        place, also where a tensor lies in memory in another order than before.

        Args:
            tensors: as many as were given when the layout was made, in that order. One that is not what it was (in
                shape, dtype or device) is not bound: its elements stay where they are.

        Returns:
            Whether all are what they were, and share storage as they did. If not, a new layout is needed.
        """
        orders = {index: cast(Order, entry[-1]) for index, entry in zip(self._indices, self._signature, strict=True)}
        found = dict(_without_repetition(tensors, self._groups, orders))
        unbound = []
        for index, (space, place) in zip(self._indices, self._places, strict=True):
            entries = self._spaces[space].entries
            if index in found and found[index].takes_the_place_of(entries[place]):
                entries[place] = found.pop(index)
            else:
                unbound.append(index)
        self._tiles.clear()
        vars(self).pop("_looked_at_together", None)
        return not found and len(unbound) == 0

    @property
    def signature(self) -> list[tuple[object, ...]]:
        """What all workers have to agree on, tensor by tensor: dtype, shape, group, order of the elements in memory."""
        return self._signature

    @property
    def indices(self) -> list[int]:
        """The places in ``tensors`` of those that were laid out, one per entry of the signature."""
        return self._indices

    @property
    def orders(self) -> "list[Order]":
        """Of each entry of the signature: its dimensions of more than one element from outermost to innermost.

        None stands for the order of its indices.
        """
        return [cast(Order, entry[-1]) for entry in self._signature]

    @property
    def places(self) -> "list[Bucket]":
        """Where the elements of each entry of the signature are."""
        ranges = []
        for space, place in self._places:
            stop = self._spaces[space].ends[place]
            ranges.append(Bucket(space, stop - self._spaces[space].entries[place].tensor.numel(), stop))
        return ranges

    def is_of_groups(self, space: int) -> bool:
        """Whether an index space holds what belongs to parameter groups; where they are apart, all of it does."""
        return self._spaces[space].entries[0].group is not None

    @property
    def fingerprint(self) -> int:
        """A 48-bit hash of the signature; exact as a float64."""
        return self._fingerprint

    @property
    def numel(self) -> int:
        """Number of elements in all index spaces; a complex element counts twice."""
        return sum(space.length for space in self._spaces)

    def cut(self, max_bytes: int, part: int = 0, parts: int = 1) -> list[Bucket]:
        """The layout, or one part of it, as ranges of nearly equal length, each at most ``max_bytes`` when packed.

        Args:
            max_bytes: the longest range, in bytes.
            part: which part, from 0.
            parts: into how many the layout is divided; of each index space they have the same length, give or take one
                element, whatever the tensors.
        """
        ranges: list[Bucket] = []
        for index, space in enumerate(self._spaces):
            slice_ = Bucket(index, space.length * part // parts, space.length * (part + 1) // parts)
            if len(slice_) > 0:
                longest = max(1, max_bytes // space.packed_dtype.itemsize)
                pieces = -(-len(slice_) // longest)
                ranges += slice_.split(-(-len(slice_) // pieces))
        return ranges

    def cut_into_spaces(self) -> list[Bucket]:
        """Each index space as one range."""
        return [Bucket(index, 0, space.length) for index, space in enumerate(self._spaces)]

    def new_buffer(self, bucket: Bucket, device: torch.device | str = "cpu") -> Tensor:
        """An uninitialized buffer that a range can be packed into: fp64 for 64-bit elements, otherwise fp32.

        Args:
            bucket: the range.
            device: where to make it for tensors on the CPU; for others it is made on their own device.
        """
        space = self._spaces[bucket.space]
        return torch.empty(len(bucket), dtype=space.packed_dtype, device=space.buffers_on(device))

    def fits(self, bucket: Bucket, buffer: Tensor, device: torch.device | str = "cpu") -> bool:
        """Whether ``buffer`` can take the place of a :meth:`new_buffer` for the range."""
        space = self._spaces[bucket.space]
        here = buffer.device == space.buffers_on(device)
        return buffer.dtype == space.packed_dtype and here and len(buffer) >= len(bucket)

    def pack(self, bucket: Bucket, out: Tensor, divisor: int = 1) -> Tensor:
        """Copy a range of the tensors, divided by ``divisor``, into ``out`` (shape: (len(bucket),)), and return it."""
        for tile in self.tiles(bucket):
            tile.pack(out[tile.start : tile.stop], divisor)
        return out

    def unpack(self, bucket: Bucket, buffer: Tensor) -> None:
        """Write ``buffer`` (shape: (len(bucket),)) into a range of the tensors, in place."""
        for tile in self.tiles(bucket):
            tile.unpack(buffer[tile.start : tile.stop])

    def tiles(self, bucket: Bucket) -> "list[Tile]":
        """A range in pieces that are short enough to stay in a cache between one operation and the next, in order.

        They are kept for the next time: to find the pieces of many small tensors takes longer than to copy them.
        """
        if bucket not in self._tiles:
            if len(self._tiles) >= _REMEMBERED:
                self._tiles.clear()
            space = self._spaces[bucket.space]
            start, tiles = 0, []
            for pieces in _in_tiles(space.pieces(bucket), _AT_ONCE.get(space.device.type, _AT_ONCE_ELSEWHERE)):
                tiles.append(Tile(start, pieces))
                start = tiles[-1].stop
            self._tiles[bucket] = tiles
        return self._tiles[bucket]

    def are_finite(self, device: torch.device | str = "cpu") -> Tensor:
        """Whether no element that belongs to a parameter group is NaN or infinite; a bool tensor of one element.

        Args:
            device: where to return it. Nobody waits for a device to get there.
        """
        together = self._looked_at_together
        return finite([extremes(views[0] if len(views) == 1 else torch.cat(views)) for views in together], device)

    @cached_property
    def _looked_at_together(self) -> list[list[Tensor]]:
        """What belongs to a parameter group: a large tensor by itself, small ones of one type and device together."""
        together: list[list[Tensor]] = []
        for space in self._spaces:
            at_once = _AT_ONCE.get(space.device.type, _AT_ONCE_ELSEWHERE)
            length = at_once
            for entry in space.entries:
                if entry.group is None:
                    continue
                length += entry.tensor.numel()
                if entry.flat is None or length > at_once:
                    together.append([])
                    length = at_once if entry.flat is None else entry.tensor.numel()
                together[-1].append(entry.tensor if entry.flat is None else entry.flat)
        return together

    def boundaries(self, bucket: Bucket) -> list[int]:
        """Where in a range a tensor begins, or goes on; relative to the range, ascending from 0."""
        lengths = [stop - start for _, start, stop in self._spaces[bucket.space].pieces(bucket)]
        return [0, *accumulate(lengths[:-1])]

    def groups(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        """The runs of a range that belong to one parameter group: (group, start, stop), relative to the range."""
        return _runs(self._spaces[bucket.space].pieces(bucket))


class Tile:
    """A short part of a :class:`Bucket`: what is done to it in turn finds it in a cache.

    Args:
        start: its first element, relative to the range.
        pieces: the parts of tensors that it covers, in order.
    """

    def __init__(self, start: int, pieces: "list[_Piece]") -> None:
        self._pieces = pieces
        self._lengths = [stop - start for _, start, stop in pieces]
        self._dense = all(entry.flat is not None for entry, _, _ in pieces)
        self._views = [entry.read(start, stop) for entry, start, stop in pieces] if self._dense else []
        self.start = start
        self.stop = start + sum(self._lengths)
        self.runs = _runs(pieces)
        """Its parts that belong to one parameter group: (group, start, stop), relative to the tile."""

    def __len__(self) -> int:
        return self.stop - self.start

    def pack(self, out: Tensor, divisor: int = 1) -> Tensor:
        """Copy it, divided by ``divisor``, into ``out`` (shape: (len(self),)), and return that."""
        sources = self._values()
        as_it_is = _alike(sources[0], out)
        if len(sources) == 1 and as_it_is and divisor != 1:
            return torch.div(sources[0], divisor, out=out)
        if len(sources) == 1:
            out.copy_(sources[0])
        elif as_it_is:
            torch.cat(sources, out=out)
        else:
            torch._foreach_copy_([*out.split(self._lengths)], sources)
        return out if divisor == 1 else out.div_(divisor)

    def difference(self, values: Tensor, out: Tensor) -> Tensor:
        """Put what it holds, less ``values``, into ``out`` (both of shape (len(self),)), and return that."""
        sources = self._values()
        if len(sources) == 1 and _alike(sources[0], out):
            return torch.sub(sources[0], values, out=out)
        return self.pack(out).sub_(values)

    def unpack(self, values: Tensor) -> None:
        """Overwrite it with ``values`` (shape: (len(self),)), in place."""
        if not self._dense:
            for (entry, start, stop), source in zip(self._pieces, values.split(self._lengths), strict=True):
                entry.write(start, stop, source)
        elif len(self._views) == 1:
            self._views[0].copy_(values)
        else:
            torch._foreach_copy_(self._views, [*values.split(self._lengths)])

    def move(self, mean: Tensor, difference: Tensor) -> None:
        """Add ``difference`` to what belongs to a parameter group; overwrite the rest with ``mean`` where they differ.

        Args:
            mean: shape (len(self),).
            difference: shape (len(self),).
        """
        targets, added = [], []
        means, changes = mean.split(self._lengths), difference.split(self._lengths)
        for (entry, start, stop), new, change in zip(self._pieces, means, changes, strict=True):
            here = entry.read(start, stop)
            if entry.group is None:
                new = torch.where(change == 0, here, new)  # what has changed on all workers alike stays changed
            elif entry.flat is None:
                new = here + change
            else:
                targets.append(here)
                added.append(change)
                continue
            if entry.flat is None:
                entry.write(start, stop, new)
            else:
                here.copy_(new)
        if targets:
            torch._foreach_add_(targets, added)

    def _values(self) -> list[Tensor]:
        return self._views if self._dense else [entry.read(start, stop) for entry, start, stop in self._pieces]


def _alike(tensor: Tensor, other: Tensor) -> bool:
    return tensor.dtype == other.dtype and tensor.device == other.device


def _in_tiles(pieces: "list[_Piece]", at_once: int) -> "Iterator[list[_Piece]]":
    """Parts of tensors, in lots of at most so many elements; a part that has no flat view is a lot of its own."""
    lot: list[_Piece] = []
    room = at_once
    for entry, start, stop in pieces:
        if entry.flat is None:  # all of it is copied to get at any of it
            if lot:
                yield lot
            yield [(entry, start, stop)]
            lot, room = [], at_once
            continue
        while start < stop:
            end = min(stop, start + room)
            lot.append((entry, start, end))
            room -= end - start
            start = end
            if room == 0:
                yield lot
                lot, room = [], at_once
    if lot:
        yield lot


def _runs(pieces: "list[_Piece]") -> list[tuple[int, int, int]]:
    runs: list[tuple[int, int, int]] = []
    position = 0
    for entry, start, stop in pieces:
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

    tensor: Tensor  # real, and without its autograd history; its indices are in the order in which it is laid out
    group: int | None
    flat: Tensor | None  # all its elements as one dimension in the same storage; None if there is no such view
    order: "Order"

    @classmethod
    def of(cls, tensor: Tensor, group: int | None) -> "_Entry":
        # .data, not .detach(): averaging must not count as an in-place change for autograd. A graph that has saved a
        # BatchNorm buffer would otherwise refuse its backward pass after a round of another optimizer.
        real = torch.view_as_real(tensor.data) if tensor.is_complex() else tensor.data
        # An expanded dimension repeats one element: that one is laid out.
        real = real[tuple(0 if stride == 0 else slice(None) for stride in real.stride())]
        strides = real.stride()
        permutation = sorted(range(real.dim()), key=lambda dim: (real.shape[dim] > 1, -strides[dim]))
        dense = real.permute(permutation)
        if dense.is_contiguous():
            return cls(dense, group, dense.view(-1), tuple(dim for dim in permutation if real.shape[dim] > 1))
        return cls(real, group, None, None)

    @classmethod
    def in_order(cls, tensor: Tensor, group: int | None, order: "Order") -> "_Entry":
        """A tensor whose elements are to be laid out in a given order; without a flat view if memory has another."""
        entry = cls.of(tensor, group)
        real = torch.view_as_real(tensor.data) if tensor.is_complex() else tensor.data
        expanded = 0 in real.stride()  # then it is not what it was, and has an order of its own
        if entry.order == order or expanded:
            return entry
        if order is not None:
            real = real.permute([*(dim for dim in range(real.dim()) if dim not in order), *order])
        return cls(real, group, real.view(-1) if real.is_contiguous() else None, order)

    def takes_the_place_of(self, other: "_Entry") -> bool:
        """Whether it has as many elements as another one, of the same type, on the same device."""
        mine, theirs = self.tensor, other.tensor
        return (mine.shape, mine.dtype, mine.device) == (theirs.shape, theirs.dtype, theirs.device)

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


def _without_repetition(
    tensors: Sequence[Tensor], groups: Sequence[int | None], orders: "Mapping[int, Order]"
) -> "Iterator[tuple[int, _Entry]]":
    """Each tensor that is laid out: its place in ``tensors``, and its entry."""
    seen: set[tuple[object, ...]] = set()
    for index, (tensor, group) in enumerate(zip(tensors, groups, strict=True)):
        if tensor.numel() == 0:
            continue
        known = index in orders
        entry = _Entry.in_order(tensor, group, orders[index]) if known else _Entry.of(tensor, group)
        if entry.storage not in seen:
            seen.add(entry.storage)
            yield index, entry


_Piece = tuple[_Entry, int, int]
"""A part of a tensor: its first element, and the one after its last."""


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

    def pieces(self, bucket: Bucket) -> list[_Piece]:
        """The parts of tensors that a range covers: (entry, start, stop) within the tensor, in order."""
        pieces = []
        position = bucket.start
        index = bisect_right(self.ends, position)
        while position < bucket.stop:
            entry, end = self.entries[index], self.ends[index]
            begin = end - entry.tensor.numel()
            stop = min(end, bucket.stop)
            pieces.append((entry, position - begin, stop - begin))
            position = stop
            index += 1
        return pieces
