"""What is trained: a small network, on a regression task whose samples never end."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.frame.hosts import Host

_TEST_SEED = 10**6


class Setup(NamedTuple):
    """What all workers of a run have in common."""

    contender: str
    workers: int
    period: int
    step_seconds: float  # that a step sleeps
    heartbeat_ms: int  # without a heartbeat for this long, the lighthouse takes a worker for dead
    timeout_seconds: float  # of a quorum and of a round
    seed: int


class Place(NamedTuple):
    """Which worker a process is."""

    worker: int
    incarnation: int  # 0: its first process
    host: Host
    lighthouse: str  # the address


class Tally:
    """Counts steps; those that were averaged are the ones that count."""

    def __init__(self) -> None:
        self.taken = 0
        self._averaged = 0  # of those taken, up to the latest round
        self._lost = 0

    @property
    def useful(self) -> int:
        """Steps that are in the average."""
        return self._averaged - self._lost

    def receive(self) -> None:
        """Another worker's state has replaced this one's: what was not averaged is lost."""
        self._lost += self.taken - self._averaged
        self._averaged = self.taken

    def average(self) -> None:
        """All steps so far are in the average."""
        self._averaged = self.taken


def new_network(seed: int) -> nn.Module:
    """The network, with the same weights for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))


def new_optimizer(network: nn.Module) -> torch.optim.Optimizer:
    """The optimizer."""
    return torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)


def training_loss(network: nn.Module, setup: Setup, place: Place, step: int) -> Tensor:
    """The loss on samples that no other worker, process or step has."""
    x, y = _samples(hash((setup.seed, place.worker, place.incarnation, step)) % 2**31, 32)
    return nn.functional.mse_loss(network(x), y)


@torch.no_grad()
def final_loss(network: nn.Module) -> float:
    """The loss on samples that are the same in all runs."""
    x, y = _samples(_TEST_SEED, 4096)
    return float(nn.functional.mse_loss(network(x), y))


def _samples(seed: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=generator)
    return x, torch.sin(x.sum(dim=1, keepdim=True)) + 0.1 * torch.randn(count, 1, generator=generator)
