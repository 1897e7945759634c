"""Runs the averaging rounds of one optimizer, in one piece or in fragments, and makes their records."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_adpsgd.averaging.state_policy import StatePolicy
from lightning_adpsgd.averaging.tensors import TensorTracker
from lightning_adpsgd.options import AveragingOptions
from lightning_adpsgd.rounds.backward import advance_in_backward
from lightning_adpsgd.rounds.contact import Contact
from lightning_adpsgd.rounds.full_round import FullRound
from lightning_adpsgd.rounds.guards import Guards
from lightning_adpsgd.rounds.handshake import Handshake, Kind, SignalFlags, naming_lost_workers
from lightning_adpsgd.rounds.measures import Measures, Measuring, learning_rates
from lightning_adpsgd.rounds.pipeline import Diverged, Drift, Pipeline, SpreadRound
from lightning_adpsgd.rounds.record import AveragingRound, Trigger
from lightning_adpsgd.rounds.schedule import StaggeredRounds, WholeRounds
from lightning_adpsgd.rounds.stopwatch import Stopwatch
from lightning_adpsgd.workers.group import WorkerGroup

_READS_LATER: bool | None = None
"""Whether a full round's measures are read in the next step; None: on CUDA only. Tests without a GPU set it."""


class RoundResult(NamedTuple):
    """The result of a round."""

    record: AveragingRound
    """The record, without the rule's target."""
    scalars: list[float]
    """The scalars that the rule sent along, as means over the workers."""
    drift: Drift | None
    """How long the values sent had drifted; None if the round must not be compared with others."""
    parameters: Sequence[Tensor]
    workers: int
    """How many were averaged."""


class RoundEngine:
    """Averages one optimizer's parameters: all at once in full rounds, or in fragments on a schedule.

    A full round completes the handshake before it overwrites anything, and then averages bucket by bucket. Fragments
    are in flight while training goes on (see :class:`Pipeline`). Both are measured and recorded in the same way.

    Args:
        optimizer: its parameters are averaged.
        options: how to average.
        module: its buffers are averaged too, and errors use its names of tensors; None if there is none.
        workers: the workers to average over.
        async_group: the same workers in a separate process group, for fragments; None: one is made if needed.
        flags: bits that are sent along.
        owners: for each parameter's id, which optimizer averages it, if several have it.
        index: the optimizer's index.
        scalars: returns the scalars that the rule sends along.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        options: AveragingOptions,
        *,
        module: nn.Module | None,
        workers: WorkerGroup,
        async_group: WorkerGroup | None,
        flags: SignalFlags,
        owners: dict[int, Any] | None,
        index: int,
        scalars: Callable[[], Sequence[float | Tensor]],
    ) -> None:
        learning_rates(optimizer, workers.device)  # raises if a group has none
        # Configuration
        self._workers = workers
        self._measures = Measures(optimizer, workers, index, scalars)
        self.tracker = TensorTracker(
            optimizer,
            buffers_of=module if options.average_buffers else None,
            exclude_buffers=options.exclude_buffers,
            names_of=module,
            workers=workers,
            bucket_bytes=options.bucket_bytes,
            codec=options.codec,
            update=options.update,
            # Two corrections of one parameter, in flight at the same time, would add up.
            owners=owners if options.overlap > 0 else None,
        )
        drop = options.on_divergence == "drop"
        self.state_policy = StatePolicy(optimizer, options.optimizer_state, drop, workers, options.bucket_bytes)
        self.guards = Guards(workers, index, self.tracker.name_of)
        self._contact = Contact(optimizer, workers, self.state_policy, self.guards, flags, index)
        means = (self.tracker, workers, self.state_policy, self.guards, self._measures)
        self._full_round = FullRound(self._contact, *means, drop=drop, bucket_bytes=options.bucket_bytes)
        self._schedule = (StaggeredRounds if options.stagger else WholeRounds)(options.overlap)
        self._opened: WorkerGroup | None = None
        self._pipeline: Pipeline | None = None
        if options.is_spread and workers.count > 1:
            if async_group is None:
                with naming_lost_workers(workers, f"opening connections for optimizer {index}"):
                    async_group = self._opened = workers.new_async_group()
            connected = (workers, async_group, self._contact.state)
            self._pipeline = Pipeline(self._schedule, self.tracker, *connected, self.state_policy)
            if options.overlap == 1 and options.codec is not None and workers.device.type == "cpu":
                advance_in_backward(optimizer, self._pipeline)
        # On CUDA a round's measures are read in the next step, so that the device stays busy.
        self._reads_later = workers.device.type == "cuda" if _READS_LATER is None else _READS_LATER

        # State
        self.local_steps = 0
        """Optimizer steps attempted since the latest round."""

    @property
    def steps(self) -> int:
        """Optimizer steps attempted so far."""
        return self._contact.steps

    @property
    def handshakes(self) -> int:
        """How many handshakes of full rounds were completed. A round's record may be read later."""
        return self._full_round.handshakes

    @property
    def has_trained(self) -> bool:
        """Whether there is something to average: steps since all workers were the same, or rounding residuals."""
        if self.local_steps > 0 or self.tracker.has_residual or self.tracker.moved_by_others:
            return True
        if self.state_policy.moves_weights:
            return True
        return self._pipeline is not None and self._pipeline.steps > 0

    def restore(self, steps: int, local_steps: int) -> None:
        """Restore the counters of a checkpoint."""
        self._contact.steps, self.local_steps = steps, local_steps
        self.state_policy.count(steps)

    def mark_synchronized(self) -> None:
        """Record that all workers were given the same values, for example from a file."""
        self._measures.discard()  # of rounds whose average has been replaced
        self.local_steps = 0
        self.tracker.moved_by_others = False
        if self._pipeline is not None:
            self._pipeline.restart()
        if self._workers.count > 1:
            self.tracker.mark_synchronized()

    def count_step(self) -> None:
        """Count a step that the optimizer has attempted."""
        self._contact.steps += 1
        self.local_steps += 1
        self.state_policy.note_step()
        self.tracker.note_step()
        if self._pipeline is not None:
            self._pipeline.steps += 1

    def launch(self, period: int) -> None:
        """Start what is due after a step, a full round or a fragment; ``period`` is that of a round starting now."""
        if self._pipeline is not None:
            self._send(self._pipeline, period)
        elif self._is_due(period):
            self.run("period", period, later=self._reads_later)

    @torch.inference_mode(False)  # training could not write to tensors that are made in inference mode
    @torch.no_grad()
    def _send(self, pipeline: Pipeline, period: int) -> None:
        with self._falling_back_to_a_whole_round(period), self._measures.booked():
            self._measure(*pipeline.send(self.steps, period))

    def is_busy(self, period: int) -> bool:
        """Whether a step needs more than counting. Between two full rounds it does not."""
        return self._pipeline is not None or self._is_due(period) or len(self._measures) > 0

    def _is_due(self, period: int) -> bool:
        """Whether a full round is due: one fragment, without a delay."""
        return self._schedule.is_due(self.local_steps, 0, period)

    def read_full_round(self) -> list[RoundResult]:
        """Read the measures of the latest full round, if they were not read yet."""
        return [self._read(measuring) for measuring in self._measures.pop_full()] if len(self._measures) > 0 else []

    @torch.inference_mode(False)
    @torch.no_grad()
    def land(self, period: int, everything: bool = False) -> list[RoundResult]:
        """Adopt the fragments that are due (or ``everything`` in flight); return the results that are ready."""
        if self._pipeline is not None:
            with self._falling_back_to_a_whole_round(period), self._measures.booked():
                if everything:
                    self._measure(*self._pipeline.finish(self.steps))
                self._measure(*self._pipeline.land(everything))
        return [self._read(measuring) for measuring in self._measures.pop_ready(self.steps, everything)]

    def keep_for_look_ahead(self, period: int) -> None:
        """At the end of a step, keep the values that are needed to look ahead after the next one."""
        if self._pipeline is not None:
            with torch.inference_mode(False), torch.no_grad(), self._measures.booked():
                self._pipeline.keep_for_look_ahead(period)

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, trigger: Trigger, period: int, also: Sequence[Tensor] = (), later: bool = False) -> None:
        """Run a full round now, with further tensors ``also``. With ``later``, its measures are read in the next step.

        No fragment may be in flight.
        """
        tensors = self.tracker.current()
        tensors.take_over()
        stopwatch = Stopwatch(self._workers.device, self._workers.patience.wait_for)
        sent_before = self._workers.payload_bytes
        pipeline = self._pipeline
        drifted = self.local_steps if pipeline is None else pipeline.clock.longest(pipeline.steps)
        numbers, dropped = self._full_round.run(trigger, period, tensors, also, lambda: self.has_trained, drifted)
        stopwatch.stop()
        self._measures.book_bytes_since(sent_before)
        # A variance among fewer workers, or of a full round in place of fragments, is not comparable with others.
        comparable = trigger == "period" and dropped == 0 and self._pipeline is None
        self._measures.append(
            Measuring(
                step=self.steps,
                trigger=trigger,
                period=period,
                drift="a period" if comparable else None,
                numbers=numbers,
                groups=tensors.averager.groups,
                read_at=self.steps + later,
                local_steps=self.local_steps,
                dropped=dropped,
                stopwatch=stopwatch,
                parameters=tensors.parameters,
            )
        )
        if self._pipeline is not None:
            self._pipeline.restart()
        self.tracker.moved_by_others = False
        self._start_from(self.steps)

    def close(self) -> None:
        """Close the connections that were opened for fragments; only full rounds may follow."""
        if self._opened is not None:
            self._opened.close()

    def _naming_lost_workers(self, kind: Kind, trigger: Trigger, period: int) -> AbstractContextManager[None]:
        in_flight = tuple if self._pipeline is None else self._pipeline.handshakes
        return naming_lost_workers(self._workers, lambda: self._contact.state(kind, trigger, period), in_flight)

    @contextmanager
    def _falling_back_to_a_whole_round(self, period: int) -> Iterator[None]:
        """If a worker has sent values that are not finite, discard them and run a full round."""
        try:
            yield
            return
        except Diverged:
            with self._naming_lost_workers("an averaging round", "period", period):
                self._measures.discard()
        self.run("period", period)

    def _measure(self, handshakes: Sequence[Handshake], ended: Sequence[SpreadRound]) -> None:
        """Act on handshakes, and start to reduce the measures of rounds whose last fragment has landed."""
        for handshake in handshakes:
            self._contact.heed(handshake)
        for round_ in ended:
            with self._naming_lost_workers("a fragment of an averaging round", "period", round_.period):
                numbers = self._measures.launch([*round_.deviations])
            # With a delay they are not needed before the next step, so nothing waits for them now.
            self._measures.append(Measuring.of_fragments(round_, numbers, self.steps + (round_.delay > 0)))

    def _read(self, measuring: Measuring) -> RoundResult:
        full = measuring.stopwatch is not None
        kind: Kind = "an averaging round" if full else "a fragment of an averaging round"
        with self._naming_lost_workers(kind, measuring.trigger, measuring.period):
            means = self._measures.read(measuring)
        local_steps = measuring.local_steps
        if not full:
            self.state_policy.end_round()
            local_steps = self.local_steps - (self.steps - measuring.step)
            self._start_from(measuring.step)
        record = self._measures.record(measuring, means, local_steps)
        scalars = means[2 * measuring.groups :]
        parameters = measuring.parameters if full else self.tracker.current().parameters
        workers = self._workers.all_contribute.contributors - measuring.dropped
        return RoundResult(record, scalars, measuring.drift, parameters, workers)

    def _start_from(self, step: int) -> None:
        """Count local steps from a round at ``step``; forget what was trained if nothing was since."""
        self.local_steps = self.steps - step
        if not self.has_trained:
            self.tracker.note_averaged()
