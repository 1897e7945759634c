"""The one place where S_k and r come from, and what a round has cost: measures on their way, and what is booked."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_adpsgd.rounds.pipeline import Drift, SpreadRound
from lightning_adpsgd.rounds.record import AveragingRound, Trigger, ring_bytes
from lightning_adpsgd.rounds.stopwatch import Stopwatch
from lightning_adpsgd.workers.group import Contribution, WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction


class Measuring(NamedTuple):
    """A round whose measures are on their way."""

    step: int
    trigger: Trigger
    period: int
    drift: Drift | None
    """For how long what was sent had drifted; None where its variance is not to be compared with that of others."""
    numbers: Reduction
    """S_g of each parameter group, γ_g of each, and what the rule has sent along; means over the workers."""
    groups: int
    read_at: int
    """The step from which on they are to be read."""
    local_steps: int = 0
    """Of a round of everything; of others those since the round before are known when the measures are read."""
    dropped: int = 0
    stopwatch: Stopwatch | None = None
    """Of a round of everything; None where fragments travelled beside training."""
    parameters: Sequence[Tensor] = ()
    """What a round of everything has averaged."""

    @classmethod
    def of_fragments(cls, round_: SpreadRound, numbers: Reduction, read_at: int) -> "Measuring":
        """Those of a round whose fragments have travelled beside training."""
        groups = len(round_.deviations)
        return cls(round_.step, "period", round_.period, round_.drift, numbers, groups, read_at)


class Measures:
    """Finds out what rounds have measured, and books what they cost to the next record.

    Args:
        optimizer: whose learning rates.
        workers: over whom means are taken.
        index: the optimizer's index.
        scalars: the numbers that the rule sends along, now.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        workers: WorkerGroup,
        index: int,
        scalars: Callable[[], Sequence[float | Tensor]],
    ) -> None:
        self._optimizer = optimizer
        self._workers = workers
        self._index = index
        self._scalars = scalars
        self._on_their_way: deque[Measuring] = deque()  # oldest first
        self._bytes = 0
        self._seconds = 0.0

    def launch(self, deviations: Sequence[float | Tensor], contribution: Contribution | None = None) -> Reduction:
        """Begin to find out S_g and γ_g of all parameter groups, as means over the workers.

        Args:
            deviations: Σ ‖w̄ − w_i‖² of this worker, per parameter group.
            contribution: this worker's; None where all contribute.
        """
        rates = learning_rates(self._optimizer, self._workers.device)
        # Groups may have come or gone since fragments were sent, perhaps on one worker alone.
        rates = [*rates, *[0.0] * len(deviations)][: len(deviations)]
        return self._workers.launch_mean([*deviations, *rates, *self._scalars()], contribution)

    def __len__(self) -> int:
        return len(self._on_their_way)

    def append(self, measuring: Measuring) -> None:
        """Have them read when it is time."""
        self._on_their_way.append(measuring)

    def pop_ready(self, step: int, everything: bool) -> Iterator[Measuring]:
        """Those that are to be read at a step, or all, oldest first."""
        while self._on_their_way and (everything or self._on_their_way[0].read_at <= step):
            yield self._on_their_way.popleft()

    def pop_full(self) -> Iterator[Measuring]:
        """Those of rounds of everything, however late they were to be read."""
        while self._on_their_way and self._on_their_way[0].stopwatch is not None:
            yield self._on_their_way.popleft()

    def discard(self) -> None:
        """Wait for all, and forget them."""
        for measuring in self._on_their_way:
            measuring.numbers.wait()
        self._on_their_way.clear()

    def read(self, measuring: Measuring) -> list[float]:
        """The means over the workers.

        Raises:
            CollectiveError: if some worker is gone.
        """
        if measuring.stopwatch is None:
            with self.booked():
                means: list[float] = measuring.numbers.wait().tolist()
        else:
            with measuring.stopwatch.waiting():
                means = measuring.numbers.wait().tolist()
            self._seconds += measuring.stopwatch.seconds
        return means

    def record(self, measuring: Measuring, means: Sequence[float], local_steps: int) -> AveragingRound:
        """S_k = Σ_g S_g and r = Σ_g S_g / γ_g over the parameter groups with γ_g > 0; and all that is booked."""
        variances, rates = means[: measuring.groups], means[measuring.groups : 2 * measuring.groups]
        record = AveragingRound(
            step=measuring.step,
            optimizer=self._index,
            trigger=measuring.trigger,
            local_steps=local_steps,
            period=measuring.period,
            learning_rate=next((rate for rate in rates if rate > 0.0), 0.0),
            variance=sum(variances),
            ratio=sum(variance / rate for variance, rate in zip(variances, rates, strict=True) if rate > 0.0),
            target=None,
            payload_bytes=self._bytes,
            sent_bytes=ring_bytes(self._bytes, self._workers.count),
            seconds=self._seconds,
            dropped=measuring.dropped,
        )
        self._bytes, self._seconds = 0, 0.0
        return record

    @contextmanager
    def booked(self) -> Iterator[None]:
        """Book the time that passes, and the bytes that are sent, to the next record."""
        started, sent_before = time.perf_counter(), self._workers.payload_bytes
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started
            self._bytes += self._workers.payload_bytes - sent_before

    def book_bytes_since(self, sent_before: int) -> None:
        """Book what was sent since then, for a round that a stopwatch of its own has timed."""
        self._bytes += self._workers.payload_bytes - sent_before


def learning_rates(optimizer: Optimizer, device: torch.device) -> list[float | Tensor]:
    """Of each parameter group, as floats; those on the device that trains stay tensors, for nobody to wait for them.

    Raises:
        ValueError: if a group has none.
    """
    rates: list[float | Tensor] = []
    for index, group in enumerate(optimizer.param_groups):
        rate = group.get("lr")
        if not isinstance(rate, int | float | Tensor):
            raise ValueError(
                f"Parameter group {index} of {type(optimizer).__name__} has lr={rate!r}: expected a number. The"
                " averaging rule needs the learning rate; use an optimizer that keeps it in its parameter groups."
            )
        on_device = isinstance(rate, Tensor) and rate.device.type == device.type
        rates.append(rate.detach() if isinstance(rate, Tensor) and on_device else float(rate))
    return rates
