"""The measures of a round, S_k and r, and its cost in bytes and seconds."""

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
from lightning_adpsgd.workers.contribution import Contribution
from lightning_adpsgd.workers.group import WorkerGroup
from lightning_adpsgd.workers.reduction import Reduction


class Measuring(NamedTuple):
    """A round whose measures are being reduced."""

    step: int
    trigger: Trigger
    period: int
    drift: Drift | None
    """How long the values sent had drifted; None if the variance must not be compared with other rounds'."""
    numbers: Reduction
    """S_g of each parameter group, γ_g of each, and the scalars of the rule, as means over the workers."""
    groups: int
    read_at: int
    """The step from which on the measures are read."""
    local_steps: int = 0
    """Of a full round. For a round in fragments they are counted when the measures are read."""
    dropped: int = 0
    stopwatch: Stopwatch | None = None
    """Of a full round; None for a round in fragments."""
    parameters: Sequence[Tensor] = ()
    """The parameters that a full round has averaged."""

    @classmethod
    def of_fragments(cls, round_: SpreadRound, numbers: Reduction, read_at: int) -> "Measuring":
        """The measures of a round in fragments."""
        groups = len(round_.deviations)
        return cls(round_.step, "period", round_.period, round_.drift, numbers, groups, read_at)


class Measures:
    """Reduces what rounds have measured and the rule's ``scalars``, and books their cost to the next record."""

    def __init__(
        self, optimizer: Optimizer, workers: WorkerGroup, index: int, scalars: Callable[[], Sequence[float | Tensor]]
    ) -> None:
        self._optimizer = optimizer
        self._workers = workers
        self._index = index
        self._scalars = scalars
        self._on_their_way: deque[Measuring] = deque()  # oldest first
        self._bytes = 0
        self._seconds = 0.0

    def launch(self, deviations: Sequence[float | Tensor], contribution: Contribution | None = None) -> Reduction:
        """Start to reduce S_g and γ_g of all parameter groups to means over the workers.

        Args:
            deviations: Σ ‖w̄ − w_i‖² of this worker, per parameter group.
            contribution: this worker's contribution to the means; None: all workers contribute.
        """
        rates = learning_rates(self._optimizer, self._workers.device)
        # Groups may have come or gone since fragments were sent, perhaps on one worker alone.
        rates = [*rates, *[0.0] * len(deviations)][: len(deviations)]
        return self._workers.launch_mean([*deviations, *rates, *self._scalars()], contribution)

    def __len__(self) -> int:
        return len(self._on_their_way)

    def append(self, measuring: Measuring) -> None:
        """Queue the measures of a round."""
        self._on_their_way.append(measuring)

    def pop_ready(self, step: int, everything: bool) -> Iterator[Measuring]:
        """Take the measures that are due at ``step``, or ``everything``, oldest first."""
        while self._on_their_way and (everything or self._on_their_way[0].read_at <= step):
            yield self._on_their_way.popleft()

    def pop_full(self) -> Iterator[Measuring]:
        """Take the measures of full rounds from the head of the queue, due or not."""
        while self._on_their_way and self._on_their_way[0].stopwatch is not None:
            yield self._on_their_way.popleft()

    def discard(self) -> None:
        """Wait for all measures, and drop them."""
        for measuring in self._on_their_way:
            measuring.numbers.wait()
        self._on_their_way.clear()

    def read(self, measuring: Measuring) -> list[float]:
        """Wait for the means over the workers, and book the time.

        Raises:
            CollectiveError: if a worker is gone.
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
        """The record: S_k = Σ_g S_g, r = Σ_g S_g / γ_g over the groups with γ_g > 0, and all that was booked."""
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
        """Book the bytes sent since ``sent_before``, for a round that has its own stopwatch."""
        self._bytes += self._workers.payload_bytes - sent_before


def learning_rates(optimizer: Optimizer, device: torch.device) -> list[float | Tensor]:
    """The learning rate of each parameter group. Tensors on ``device`` stay tensors: the host does not wait for them.

    Raises:
        ValueError: if a group has no learning rate.
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
