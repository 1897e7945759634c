"""Lays tensors end to end in index spaces, one per dtype and device. Any range can be packed and unpacked."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, cast

import torch
from torch import Tensor

from lightning_adpsgd.averaging.tiles import Entry, Order, Space, Tile, at_once, entries_of, runs

_REMEMBERED = 256  # buckets whose tiles are cached: up to 4 GiB of parameters on a CPU

Described = tuple[object, ...]
"""A tensor's name, and what all workers have to agree on: dtype, shape, parameter group, order in memory."""


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
        """Whether the two buckets have elements in common."""
        return self.space == other.space and self.start < other.stop and other.start < self.stop

    def without(self, other: "Bucket") -> "list[Bucket]":
        """The ranges of this bucket, in order, that are not in ``other``."""
        if not self.overlaps(other):
            return [self]
        left = Bucket(self.space, self.start, max(self.start, other.start))
        right = Bucket(self.space, min(self.stop, other.stop), self.stop)
        return [rest for rest in (left, right) if len(rest) > 0]


def hash48(data: bytes) -> int:
    """A 48-bit hash. A float64 holds it exactly, so workers can exchange it in a table of numbers."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=6).digest(), "big")


def has_mean(tensor: Tensor) -> bool:
    """Whether a tensor can be averaged: its dtype is floating-point or complex, not integer or bool."""
    return tensor.is_floating_point() or tensor.is_complex()


def extremes(values: Tensor) -> Tensor:
    """Minimum and maximum of real values. Both are finite if and only if all values are, since both propagate NaN."""
    return torch.stack(torch.aminmax(values))


def finite(found: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """Whether all of these :func:`extremes` are finite; a bool tensor of one element on ``device``."""
    if not found:
        return torch.tensor(True, device=device)
    return torch.isfinite(torch.stack([each.to(device, torch.float64) for each in found])).all()


class FlatLayout:
    """Index spaces over many tensors, so that averaging can cut buckets anywhere, whatever the tensors' sizes.

    Each index space holds the tensors of one dtype on one device. Complex tensors appear as pairs of reals. Tensors
    that share storage are laid out once, empty tensors not at all. Packing widens 16-bit elements to fp32. A dense
    tensor is laid out in the order of its memory, whatever its memory format; any other in the order of its indices.

    Args:
        tensors: the tensors, in the order in which to lay them out.
        groups: for each tensor, the index of its parameter group, or None if it belongs to none. Tensors of one group
            should be adjacent.
        orders: for some tensors, by their index in ``tensors``: the order in which to lay out their elements, if not
            the order in memory.
        apart: whether tensors of no group get index spaces of their own.

    Raises:
        ValueError: if ``tensors`` and ``groups`` differ in length.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        groups: Sequence[int | None],
        orders: Mapping[int, Order] | None = None,
        apart: bool = False,
    ) -> None:
        self.indices: list[int] = []
        """The indices in ``tensors`` of the tensors that are laid out."""
        self.signature: list[tuple[object, ...]] = []
        """For each of ``indices``, what all workers have to agree on: dtype, shape, group, order of the elements."""
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
        """Bind the layout to ``tensors``: the same tensors as before, perhaps in new storage.

        User code may re-assign a buffer or re-point ``p.data``. Every element keeps its position in the layout, even if
        its tensor's order in memory has changed.

        Args:
            tensors: as many as the layout was made of, in the same order. A tensor whose shape, dtype or device has
                changed is not bound: its entry keeps the old storage.

        Returns:
            Whether shapes, dtypes, devices and sharing of storage are unchanged. If not, a new layout is needed.
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
        """The range that each entry of the signature occupies."""
        found = []
        for number, place in self._places:
            space = self._spaces[number]
            found.append(Bucket(number, space.ends[place] - space.entries[place].tensor.numel(), space.ends[place]))
        return found

    def is_of_groups(self, space: int) -> bool:
        """Whether the first tensor of an index space belongs to a parameter group; with ``apart``, then all do."""
        return self._spaces[space].entries[0].group is not None

    def dtype(self, space: int) -> torch.dtype:
        """Of the numbers in an index space."""
        return self._spaces[space].entries[0].tensor.dtype

    def cut(self, max_bytes: int, part: int = 0, parts: int = 1) -> list[Bucket]:
        """Cut the layout, or one part of it, into buckets of nearly equal length.

        Args:
            max_bytes: size of the largest packed bucket.
            part: index of the part, from 0.
            parts: number of parts. Each has the same share of every index space, give or take one element.
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
            bucket: the bucket to pack.
            device: where to allocate the buffer for CPU tensors; other tensors are packed on their own device.
        """
        space = self._spaces[bucket.space]
        return torch.empty(len(bucket), dtype=space.packed_dtype, device=space.buffers_on(device))

    def fits(self, bucket: Bucket, buffer: Tensor, device: torch.device | str = "cpu") -> bool:
        """Whether ``buffer`` can be used in place of a :meth:`new_buffer` for the bucket."""
        space = self._spaces[bucket.space]
        here = buffer.device == space.buffers_on(device)
        return buffer.dtype == space.packed_dtype and here and len(buffer) >= len(bucket)

    def pack(self, bucket: Bucket, out: Tensor) -> Tensor:
        """Copy a bucket of the tensors into ``out`` (shape (len(bucket),)); return ``out``."""
        for tile in self.tiles(bucket):
            tile.pack(out[tile.start : tile.stop])
        return out

    def unpack(self, bucket: Bucket, buffer: Tensor) -> None:
        """Write ``buffer`` (shape (len(bucket),)) into a bucket of the tensors, in place."""
        for tile in self.tiles(bucket):
            tile.unpack(buffer[tile.start : tile.stop])

    def tiles(self, bucket: Bucket) -> list[Tile]:
        """The tiles of a bucket, in order.

        They are cached: finding the pieces of many small tensors takes longer than copying them.
        """
        if bucket not in self._tiles:
            if len(self._tiles) >= _REMEMBERED:
                self._tiles.clear()
            self._tiles[bucket] = self._spaces[bucket.space].tiles(bucket.start, bucket.stop)
        return self._tiles[bucket]

    def are_finite(self, device: torch.device | str = "cpu") -> Tensor:
        """Whether no element of a parameter group is NaN or infinite: a bool tensor of one element on ``device``."""
        together = self._looked_at_together
        return finite([extremes(views[0] if len(views) == 1 else torch.cat(views)) for views in together], device)

    @cached_property
    def _looked_at_together(self) -> list[list[Tensor]]:
        """The tensors of parameter groups, batched: each large one alone, small ones of an index space together."""
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

    def groups(self, bucket: Bucket) -> list[tuple[int, int, int]]:
        """The bucket's runs of elements of one parameter group: (group, start, stop), relative to the bucket."""
        return runs(self._spaces[bucket.space].pieces(bucket.start, bucket.stop))
