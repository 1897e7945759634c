"""Which faults there are, and when they happen."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

KINDS = {
    "kill": "a worker killed by SIGKILL, and started again",
    "stop": "a worker stopped by SIGSTOP, and continued",
    "cut": "a worker's host cut off from the network, and joined again",
    "lighthouse": "the lighthouse killed, and started again on the same port",
}
OWN_END = "own end"
"""The kind of a fault that was not done: a process that has ended by itself. It is started again as well."""


class Draw(NamedTuple):
    """A fault to come."""

    wait_seconds: float  # after the one before it
    kind: str
    order: tuple[int, ...]  # of the workers: the first one that is healthy is struck


def draws(seed: int, every: float, kinds: Sequence[str], workers: int) -> Iterator[Draw]:
    """A Poisson process with ``every`` seconds on average between faults; the seed decides when, what and whom.

    All kinds come in random order, and again in another one, so that there are as many of each even in a short run.
    """
    random_ = random.Random(seed)
    while True:
        for kind in random_.sample(kinds, len(kinds)):
            yield Draw(random_.expovariate(1 / every), kind, tuple(random_.sample(range(workers), workers)))
