"""The share of the data of one worker among a stated maximum, which goes on where a lost worker has been."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Sampler
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override


class ShardSampler(Sampler[int]):
    """One worker's share of the samples, which changes from epoch to epoch.

    In epoch e, worker i has share (i + e) mod n. So what the share of a missing worker holds is seen in other epochs,
    even if the data are not shuffled.

    Args:
        sampler: torch's, whose rank is the worker's number.
        start: how many samples to leave out once, because they were seen before this process has begun.
    """

    def __init__(self, sampler: "DistributedSampler[Any]", start: int = 0) -> None:
        self._sampler = sampler
        self._worker = sampler.rank
        self._start = start

    def set_epoch(self, epoch: int) -> None:
        """Take the share and the order of another epoch."""
        self._sampler.set_epoch(epoch)
        self._sampler.rank = (self._worker + epoch) % self._sampler.num_replicas

    @override
    def __iter__(self) -> Iterator[int]:
        start, self._start = self._start, 0
        yield from list(self._sampler)[start:]

    def __len__(self) -> int:
        return len(self._sampler)


def shard(loader: Any, epoch: int, batches: int) -> None:
    """Have a ``DataLoader`` go through the worker's shares, from a batch of an epoch on.

    Args:
        loader: it is left alone unless its sampler is torch's ``DistributedSampler``.
        epoch: the first epoch.
        batches: how many batches of this epoch were seen before.
    """
    places = getattr(loader, "batch_sampler", None)  # holds the sampler; the loader's own cannot be replaced
    sampler = getattr(places, "sampler", None)
    if places is None or not isinstance(loader, DataLoader) or not isinstance(sampler, DistributedSampler):
        return
    # A loader with a batch sampler of the user's has no batch size itself.
    shares = ShardSampler(sampler, batches * (getattr(places, "batch_size", None) or 1))
    shares.set_epoch(epoch)
    places.sampler = shares
