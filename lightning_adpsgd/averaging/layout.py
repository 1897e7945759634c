"""Tensors laid end to end: one index space per dtype and device, any bucket of which can be packed and unpacked."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_adpsgd.averaging.tiles import Entry, Order, Space, Tile, at_once, entries_of, runs

_REMEMBERED = 256  # buckets whose tiles are kept: up to 4 GiB of parameters on a CPU

Described = tuple[object, ...]
"""A tensor as all workers have to have it: name, dtype, shape, parameter group, order in memory."""


class Bucket(NamedTuple):
    """Elements ``start`` to ``stop`` (exclusive) of one index space of a :class:`FlatLayout`."""

    space: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def split(self, length: int) -> "Iterator[Bucket]":
        """This bucket in pieces of at most ``length`` elements, in order."""
        for start in range(self.start, self.stop, length):
            yield Bucket(self.space, start, min(start + length, self.stop))

    def overlaps(self, other: "Bucket") -> bool:
        """Whether they have elements in common."""
        return self.space == other.space and self.start < other.stop and other.start < self.stop

    def without(self, other: "Bucket") -> "list[Bucket]":
        """What is left of this bucket, in order, when another one is taken out of it."""
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
        tensors: what to lay out, in this order.
        groups: for each tensor, the index of its parameter group, or None if it belongs to no group. Tensors of a group
            are best given one after the other.
        orders: for some tensors, by their place in ``tensors``: in which order to lay out their elements, whatever the
            order in memory.
        apart: whether tensors of no group get index spaces of their own.

    Raises:
        ValueError: if there are not as many groups as tensors.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        groups: Sequence[int | None],
        orders: Mapping[int, Order] | None = None,
        apart: bool = False,
    ) -> None:
        self.indices: list[int] = []
        """The places in ``tensors`` of those that were laid out."""
        self.signature: list[tuple[object, ...]] = []
        """What all workers have to agree on, for each of them: dtype, shape, group, order of the elements."""
        spaces: dict[tuple[object, ...], list[Entry]] = {}
        places: list[tuple[tuple[object, ...], int]] = []
        for index, entry in entries_of(tensors, groups, orders or {}):
            tensor = tensors[index]
            key = (tensor.dtype, entry.tensor.device, apart and entry.group is None)
            entries = spaces.setdefault(key, [])
            places.append((key, len(entries)))
            entries.append(entry)
            self.indices.append(index)
            self.signature.append((str(tensor.dtype), tuple(tensor.shape), entry.group, entry.order))
        self.fingerprint = hash48(repr(self.signature).encode())
        """A 48-bit hash of the signature; exact as a float64."""
        self._spaces = [Space(entries) for entries in spaces.values()]
        numbers = {key: number for number, key in enumerate(spaces)}
        self._places = [(numbers[key], place) for key, place in places]
        self._groups = [*groups]
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
        orders = {index: cast(Order, entry[-1]) for index, entry in zip(self.indices, self.signature, strict=True)}
        found = dict(entries_of(tensors, self._groups, orders))
        complete = True
        for index, (space, place) in zip(self.indices, self._places, strict=True):
            entries = self._spaces[space].entries
            if index in found and found[index].can_replace(entries[place]):
                entries[place] = found.pop(index)
            else:
                complete = False
        self._tiles.clear()
        vars(self).pop("_looked_at_together", None)
        return complete and not found

    @property
    def places(self) -> list[Bucket]:
        """Where the elements of each entry of the signature are."""
        found = []
        for number, place in self._places:
            space = self._spaces[number]
            found.append(Bucket(number, space.ends[place] - space.entries[place].tensor.numel(), space.ends[place]))
        return found

    def is_of_groups(self, space: int) -> bool:
        """Whether an index space holds what belongs to parameter groups; where they are apart, all of it does."""
        return self._spaces[space].entries[0].group is not None

    def dtype(self, space: int) -> torch.dtype:
        """Of the numbers in an index space."""
        return self._spaces[space].entries[0].tensor.dtype

    def cut(self, max_bytes: int, part: int = 0, parts: int = 1) -> list[Bucket]:
        """The layout, or one part of it, as buckets of nearly equal length.

        Args:
            max_bytes: of the longest bucket, when packed.
            part: which part, from 0.
            parts: into how many the layout is divided; of each index space they have the same length, give or take one
                element, whatever the tensors.
        """
        buckets: list[Bucket] = []
        for index, space in enumerate(self._spaces):
            whole = Bucket(index, space.length * part // parts, space.length * (part + 1) // parts)
            if len(whole) > 0:
                longest = max(1, max_bytes // space.packed_dtype.itemsize)
                pieces = -(-len(whole) // longest)
                buckets += whole.split(-(-len(whole) // pieces))
        return buckets

    def cut_into_spaces(self) -> list[Bucket]:
        """Each index space as one bucket."""
        return [Bucket(index, 0, space.length) for index, space in enumerate(self._spaces)]

    def new_buffer(self, bucket: Bucket, device: torch.device | str = "cpu") -> Tensor:
        """An uninitialized buffer to pack a bucket into: fp64 for 64-bit elements, otherwise fp32.

        Args:
            bucket: what is to be packed.
            device: where to make it for tensors on the CPU; for others it is made on their own device.
        """
        space = self._spaces[bucket.space]
        return torch.empty(len(bucket), dtype=space.packed_dtype, device=space.buffers_on(device))

    def fits(self, bucket: Bucket, buffer: Tensor, device: torch.device | str = "cpu") -> bool:
        """Whether ``buffer`` can take the place of a :meth:`new_buffer` for the bucket."""
        space = self._spaces[bucket.space]
        here = buffer.device == space.buffers_on(device)
        return buffer.dtype == space.packed_dtype and here and len(buffer) >= len(bucket)

    def pack(self, bucket: Bucket, out: Tensor, divisor: int = 1) -> Tensor:
        """Copy a bucket of the tensors, divided by ``divisor``, into ``out`` (shape: (len(bucket),)), and return it."""
        for tile in self.tiles(bucket):
            tile.pack(out[tile.start : tile.stop], divisor)
        return out

    def unpack(self, bucket: Bucket, buffer: Tensor) -> None:
        """Write ``buffer`` (shape: (len(bucket),)) into a bucket of the tensors, in place."""
        for tile in self.tiles(bucket):
            tile.unpack(buffer[tile.start : tile.stop])

    def tiles(self, bucket: Bucket) -> list[Tile]:
        """A bucket in tiles, in order.

        They are kept for the next time: to find the pieces of many small tensors takes longer than to copy them.
        """
        if bucket not in self._tiles:
            if len(self._tiles) >= _REMEMBERED:
                self._tiles.clear()
            self._tiles[bucket] = self._spaces[bucket.space].tiles(bucket.start, bucket.stop)
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
        """What belongs to a parameter group: a large tensor by itself, small ones of an index space together."""
        together: list[list[Tensor]] = []
        for space in self._spaces:
            room = 0
            for entry in space.entries:
                if entry.group is None:
                    continue
                values = entry.tensor if entry.flat is None else entry.flat
                if entry.flat is None or values.numel() > room:
                    together.append([])
                    room = at_once(space.device)
                together[-1].append(values)
                room = 0 if entry.flat is None else room - values.numel()
        return together

    def boundaries(self, bucket: Bucket) -> list[int]:
        """Where in a bucket a tensor begins, or goes on; relative to the bucket, ascending from 0."""
        pieces = self._spaces[bucket.space].pieces(bucket.start, bucket.stop)
        return [0, *accumulate(stop - start for _, start, stop in pieces[:-1])]

    def groups(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        """The runs of a bucket that belong to one parameter group: (group, start, stop), relative to the bucket."""
        return runs(self._spaces[bucket.space].pieces(bucket.start, bucket.stop))
